"""Checkpoints that are whole or not there: written beside their place, then moved into it in one step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

STAGING = ".unfinished"
"""Folder in the output folder that holds a checkpoint while it is written; left behind by a run that was killed."""


class WholeCheckpoints(_Base):
    """Mixin of a ``transformers.Trainer``: a run that is killed while it saves leaves the checkpoints from before.

    The name ``checkpoint-N`` appears when everything is in it, so that the last one can always be resumed from.
    """

    _staging = False

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.push_to_hub:  # uploads read the folder that was written, later
            super()._save_checkpoint(model, trial)
            return
        run = Path(self._get_output_dir(trial))
        staging = run / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self._renamed_best(staging, run) and self.args.should_save:
            self.state.save_to_json(str(staging / f"checkpoint-{self.state.global_step}" / "trainer_state.json"))
        if self.args.should_save:
            _move(staging / f"checkpoint-{self.state.global_step}", run)
            staging.rmdir()
            self._rotate(run)
        self.accelerator.wait_for_everyone()

    def _renamed_best(self, staging: Path, run: Path) -> bool:
        """Gives the best checkpoint the path it will have. Returns whether it is the one just written."""
        best = self.state.best_model_checkpoint
        if best is None or Path(best).parent != staging:
            return False
        self.state.best_model_checkpoint = str(run / Path(best).name)
        return True

    def _rotate(self, run: Path) -> None:
        """Deletes the oldest checkpoints beyond ``save_total_limit``, but neither the newest nor the best."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {run / f"checkpoint-{self.state.global_step}", Path(self.state.best_model_checkpoint or run)}
        # By time, since the folder may hold checkpoints of an earlier run that went further.
        checkpoints = sorted(run.glob("checkpoint-[0-9]*"), key=lambda path: path.stat().st_mtime)
        spare = [path for path in checkpoints if path not in kept]
        for path in spare[: max(0, len(checkpoints) - limit)]:
            shutil.rmtree(path, ignore_errors=True)


def _move(checkpoint: Path, folder: Path) -> None:
    """Moves a checkpoint into a folder, in the place of one of that name."""
    target = folder / checkpoint.name
    if target.exists():
        old = checkpoint.parent / "replaced"
        os.replace(target, old)
        os.replace(checkpoint, target)
        shutil.rmtree(old)
    else:
        os.replace(checkpoint, target)
