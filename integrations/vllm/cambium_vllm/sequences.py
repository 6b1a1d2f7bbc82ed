"""The sequences of one call of vLLM: tokens of many, flat, and which belong together."""

from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

from .modeling.sequences_cambium import Step


class Rows(Step):
    """What the units see of B sequences with T tokens each, without padding, at `positions` (B, T)."""

    def __init__(self, config, positions):
        self.config, self.positions = config, positions
        self.padded, self.real = False, None
        # Rotations by length are those of short texts: model.py refuses longer ones.
        self.lengths = torch.ones(1, dtype=torch.long, device="cpu")
        self.made, self.groups, self.number = {}, {}, 0

    def turn_by(self, number):
        self.number = number
        super().turn_by(number)

    def of(self, group):
        """The rows of a group, under the rotation that is on."""
        key = id(group)
        if key not in self.groups:
            self.groups[key] = Rows(self.config, self.positions[0][group.tokens])
        self.groups[key].turn_by(self.number)
        return self.groups[key]


@dataclass
class Group:
    """Sequences with the same number of new tokens."""

    tokens: torch.Tensor  # (B, T): where they stand among all tokens of the call
    pages: torch.Tensor  # (B): where the sequences' states lie
    fresh: torch.Tensor  # (B): whether these tokens are the sequence's first


@dataclass
class Groups:
    groups: list[Group]


class GroupsBuilder(AttentionMetadataBuilder[Groups]):
    """Makes groups of vLLM's batch: all that decode, and prompts of equal length."""

    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        by_length = {}
        for row, (begin, end) in enumerate(zip(starts, starts[1:])):
            if end > begin:
                by_length.setdefault(end - begin, []).append(row)
        device = common.seq_lens.device
        mode = self.vllm_config.cache_config.mamba_cache_mode
        table = mamba_get_block_table_tensor(common.block_table_tensor, common.seq_lens, self.kv_cache_spec, mode)
        pages = table[:, 0].long()
        fresh = common.compute_num_computed_tokens() <= 0
        groups = []
        for length, rows in by_length.items():
            begins = torch.tensor([starts[row] for row in rows], device=device)
            rows = torch.tensor(rows, device=device)
            tokens = begins[:, None] + torch.arange(length, device=device)
            groups.append(Group(tokens, pages[rows], fresh[rows]))
        return Groups(groups)


class StatesBackend(AttentionBackend):
    @staticmethod
    def get_name():
        return "CAMBIUM_STATES"

    @staticmethod
    def get_builder_cls():
        return GroupsBuilder

    @classmethod
    def is_ssm(cls):
        return True
