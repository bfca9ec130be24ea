"""Run as a program by `run_in_fresh_process`: loads a checkpoint's remote code and calls it.

Reads a question as JSON from standard input and answers with JSON on the last line of standard output.
"""

import json
import sys


class _Refuse:
    """Makes `import hf_tokenprune` fail even where it is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "hf_tokenprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main() -> None:
    sys.meta_path.insert(0, _Refuse())
    import torch
    import transformers

    question = json.load(sys.stdin)
    inputs = {name: torch.tensor(value) for name, value in question["inputs"].items()}
    answer = {}
    for name in question["auto_classes"]:
        auto = getattr(transformers, name)
        model = auto.from_pretrained(question["folder"], trust_remote_code=True).eval()
        with torch.no_grad():
            output = model(**inputs, output_token_trace=True)
        tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
        answer[name] = {
            "class": type(model).__name__,
            "output": tensor.float().tolist(),
            "counts": output["token_trace"].counts.tolist(),
        }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
