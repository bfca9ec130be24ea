"""Fine-tuning: data, and what the stock `Trainer` needs around a pruned model."""
