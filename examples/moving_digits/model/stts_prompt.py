"""Cutting a prompt to the kept tokens: one index, applied to everything that is as long as the prompt."""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class PromptCut(NamedTuple):
    """
    Where the kept tokens of each row stood in the uncut prompt. Made by `cut_prompt`.

    kept_token_idx (`torch.Tensor` of shape `(batch_size, cut_length)`, int64): positions in the uncut prompt, rising
        in each row; -1 for padding.
    attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): of the uncut prompt.
    """

    kept_token_idx: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def cut_length(self) -> int:
        return self.kept_token_idx.shape[1]

    @property
    def num_removed(self) -> int:
        """Columns by which the cut prompt is shorter."""
        return self.attention_mask.shape[1] - self.cut_length

    def take(self, values: torch.Tensor, padding: int | float) -> torch.Tensor:
        """
        Args:
            values (`torch.Tensor` of shape `(batch_size, sequence_length, ...)`): anything as long as the prompt.
            padding (`float`): what stands where the cut row has padding.

        Returns:
            `torch.Tensor` of shape `(batch_size, cut_length, ...)`.
        """
        idx = self.kept_token_idx.to(values.device)
        trailing = (1,) * (values.dim() - 2)
        taken = values.take_along_dim(idx.clamp(min=0).view(*idx.shape, *trailing), dim=1)
        return taken.masked_fill((idx < 0).view(*idx.shape, *trailing), padding)

    def extend(self, num_rows: int, num_new: int) -> "PromptCut":
        """
        The cut of longer prompts that begin with these.

        Args:
            num_rows (`int`): number of the longer prompts, a multiple of the rows here (beams of a prompt are
                neighbors).
            num_new (`int`): tokens that follow in each.
        """
        repeats = num_rows // self.kept_token_idx.shape[0]
        kept, mask = (tensor.repeat_interleave(repeats, dim=0) for tensor in self)
        new_idx = torch.arange(mask.shape[1], mask.shape[1] + num_new, device=kept.device).expand(num_rows, -1)
        return PromptCut(torch.cat([kept, new_idx], dim=1), F.pad(mask, (0, num_new), value=1))


def check_placeholders(placeholder_mask: torch.Tensor, num_windows: int) -> None:
    """
    Checks that a batch of prompts has a token for every window of its videos.

    Args:
        placeholder_mask (`torch.Tensor`, bool): where video tokens stand.
        num_windows (`int`): windows of all videos.

    Raises:
        ValueError: if the numbers differ.
    """
    num_placeholders = int(placeholder_mask.sum())
    if num_placeholders != num_windows:
        raise ValueError(
            f"The prompts of this batch hold {num_placeholders} video tokens, but its videos have {num_windows} "
            "windows. Both must come from one call of the processor, and a prompt must not be truncated."
        )


def cut_prompt(
    placeholder_mask: torch.Tensor, keep: torch.Tensor, attention_mask: torch.Tensor, num_untouched: int = 0
) -> PromptCut:
    """
    Cuts dropped placeholders out of a batch of prompts, and the padding at their ends, so that the longest row has
    none.

    Rows stay padded on the side they were padded on. A kept placeholder stays even where the attention mask hides it,
    because its features need a place.

    Args:
        placeholder_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, bool): where video tokens stand.
        keep (`torch.Tensor` of shape `(num_placeholders,)`, bool): which of them stay, in row-major order.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 0 = padding.
        num_untouched (`int`): leading columns that stay as they are (a cache already holds them).

    Returns:
        `PromptCut`

    Raises:
        ValueError: if the number of placeholders is not that of `keep`.
    """
    placeholder_mask, keep = placeholder_mask.to(attention_mask.device), keep.to(attention_mask.device)
    check_placeholders(placeholder_mask, keep.numel())
    is_kept = placeholder_mask.masked_scatter(placeholder_mask, keep)
    is_real = attention_mask.bool()
    # Text that is hidden between real tokens stays: it may have a label.
    is_inside = is_real.cumsum(-1).bool() & is_real.flip(-1).cumsum(-1).flip(-1).bool()
    survives = torch.where(placeholder_mask, is_kept, is_inside)
    survives[:, :num_untouched] = True
    pad_right = bool((attention_mask[:, -1] == 0).any())
    cut_length = int(survives.sum(-1).max())
    order = survives.byte().argsort(dim=-1, descending=pad_right, stable=True)
    order = order[:, :cut_length] if pad_right else order[:, order.shape[1] - cut_length :]
    return PromptCut(torch.where(survives.gather(1, order), order, -1), attention_mask)
