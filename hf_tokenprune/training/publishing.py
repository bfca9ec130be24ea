"""What a trainer writes beside a model and publishes with it: nothing that has to be unpickled."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress, hf_api

from ..files import write_atomically
from ..modeling.model_repository import PICKLES


ARGUMENTS = "training_args.json"


class WithoutPickles:
    """Goes before `Trainer`.

    Modifications:
        - The arguments beside a model are JSON, without tokens. Nobody reads the native pickle, resuming neither.
        - What is published during training has the code that a stranger needs, and no pickle; with the strategies that
          publish whole checkpoints for resuming, those have what resuming needs.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
            arguments = json.dumps(self.args.to_dict(), indent=2, default=str)
            write_atomically(folder / ARGUMENTS, f"{arguments}\n".encode())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args, pushing = self.args, self.push_in_progress is not None and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if pushing and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        # Copies, because the checkpoint may be rotated away before it is uploaded.
        for file in Path(checkpoint_folder).iterdir():
            if file.is_file() and file.suffix not in PICKLES and file.name != TRAINER_STATE_NAME:
                shutil.copy(file, args.output_dir)
        jobs = self._uploads(Path(checkpoint_folder))
        if pushing:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _uploads(self, checkpoint: Path) -> list[Any]:
        args = self.args
        upload = partial(
            hf_api().upload_folder,
            repo_id=self.hub_model_id,
            token=args.hub_token,
            revision=args.hub_revision,
            run_as_future=True,
        )
        steps = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {when}"
        ignored = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*", TRAINING_ARGS_NAME]
        jobs = [upload(folder_path=args.output_dir, commit_message=message, ignore_patterns=ignored)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            jobs.append(upload(folder_path=checkpoint, path_in_repo=place, commit_message=f"{message}, checkpoint"))
        return jobs
