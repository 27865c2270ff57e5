"""Checkpoints that are there whole or not at all, whatever stopped the run that wrote them.

The Trainer writes a checkpoint in place, so a run that is killed meanwhile, or whose disk is full, leaves half of one
under the name that the next run would resume from. Here it writes to a hidden folder beside it, OUTPUT/.saving; when
all processes are done and the files have reached the disk, the folder is renamed to checkpoint-N in one step. Older
ones are removed only after that. What is inside is the Trainer's business, so DDP, FSDP2 and DeepSpeed do not differ.
"""

import errno
import logging
import os
import re
import shutil
from contextlib import suppress
from typing import Any

from torch import nn
from transformers import Trainer

from ..saving import NO_ROOM, sync, sync_tree, system_error

logger = logging.getLogger(__name__)

SAVING = ".saving"  # folder for what is not complete, or on its way out
STATE = "trainer_state.json"  # the Trainer reads it first when it resumes
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: str) -> list[str]:
    """Return the paths of the checkpoints in a folder, by step, the last one last."""
    found = [_NAME.fullmatch(name) for name in (os.listdir(folder) if os.path.isdir(folder) else [])]
    return [os.path.join(folder, m[0]) for m in sorted((m for m in found if m), key=lambda m: int(m[1]))]


def last_checkpoint(folder: str) -> str | None:
    """Return the last complete checkpoint in a folder, or None.

    One without its state file is not complete: transformers wrote it, and something stopped it. A warning names it.
    """
    for path in reversed(checkpoints(folder)):
        if os.path.isfile(os.path.join(path, STATE)):
            return path
        logger.warning("%s is not complete and is passed over", path)
    return None


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoints appear complete."""

    _saving = False  # a checkpoint is being written
    _pushed = False  # and goes to the Hub when it is

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, SAVING) if self._saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving:  # it uploads in the background, from a folder that would be renamed under its hands
            self._pushed = True
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            OSError: there is no room for it; names it and the last one that is complete.
        """
        folder = self._get_output_dir(trial)
        name = f"checkpoint-{self.state.global_step}"
        final, saving = os.path.join(folder, name), os.path.join(folder, SAVING)
        partial = os.path.join(saving, name)
        alone = self.is_local_process_zero()  # one of each machine: they may not share a disk
        if alone:
            shutil.rmtree(saving, ignore_errors=True)  # of a run that was killed
            os.makedirs(saving, exist_ok=True)
        self.accelerator.wait_for_everyone()
        try:
            self._saving = True
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == partial:
                self.state.best_model_checkpoint = final
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(partial, STATE))
            self.accelerator.wait_for_everyone()
            if alone and os.path.isdir(partial):
                sync_tree(partial)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not _no_room(error):
                raise
            kept, free = last_checkpoint(folder), shutil.disk_usage(folder).free / 2**20
            raise OSError(
                system_error(error) or errno.ENOSPC,
                f"no room to write {name} to {folder} ({free:,.0f} MiB free); nothing of it was kept"
                + (f". {os.path.basename(kept)} is complete, --resume goes on from it" if kept else ""),
            ) from error
        finally:
            self._saving = False
        if self.is_world_process_zero():
            _put_in_place(partial, final)
        self.accelerator.wait_for_everyone()
        if alone:
            _put_in_place(partial, final)  # where each machine has a disk of its own
            self._remove_old(folder, final)
            shutil.rmtree(saving, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self._pushed:
            self._pushed = False
            self._push_from_checkpoint(final)

    def _remove_old(self, folder: str, newest: str) -> None:
        """Keep as many checkpoints as the arguments say, the newest and the best among them."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        paths = sorted(checkpoints(folder), key=os.path.getmtime)
        others = [path for path in paths if path not in (newest, self.state.best_model_checkpoint)]
        excess = len(paths) - max(limit, len(paths) - len(others))
        for path in others[: max(excess, 0)]:
            with suppress(OSError):  # another machine on the same disk was faster
                # renamed first: one that is half removed should not be found
                gone = os.path.join(folder, SAVING, f"old-{os.path.basename(path)}")
                os.rename(path, gone)
                shutil.rmtree(gone, ignore_errors=True)


def _no_room(error: Exception) -> bool:
    """Say whether an error of writing means that the disk is full; torch.save does not tell the reason of its own."""
    texts = ("inline_container.cc", "iostream error")
    return system_error(error) in NO_ROOM or any(text in str(error) for text in texts)


def _put_in_place(partial: str, final: str) -> None:
    """Rename a folder to where there may be an old one; nothing to do if it has been renamed already."""
    try:
        os.rename(partial, final)
    except FileNotFoundError:
        return
    except OSError:  # a run that went on from an earlier checkpoint comes by here again
        old = os.path.join(os.path.dirname(partial), f"old-{os.path.basename(final)}")
        os.rename(final, old)
        os.rename(partial, final)
    sync(os.path.dirname(final))
