"""PEFT's mixed-batch semantics in eval: every model and pair of configs of its own MixedAdapterBatches tests for LoRA.

Whatever stock PEFT does with `adapter_names=`, results or an error, an enabled model does too, and its rows are those of
the single adapters.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mtkernels.integrations import adapters, enable

X = torch.arange(90).view(-1, 10)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.relu, self.lin1 = nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2)

    def forward(self, X):
        return torch.log_softmax(self.lin1(self.relu(self.lin0(X.float()))), -1)


class MLPWithGRU(MLP):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(20, 20, batch_first=True)

    def forward(self, X):
        return self.lin1(self.gru(self.relu(self.lin0(X.float()))[:, None])[0][:, 0])


class EmbeddingConv1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), nn.Conv1d(5, 7, 3), nn.Linear(56, 2)

    def forward(self, X):
        return self.lin0(torch.relu(self.conv1d(self.emb(X).transpose(1, 2))).flatten(1))


class Conv2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv2d, self.lin0 = nn.Conv2d(5, 10, 3), nn.Linear(10, 2)

    def forward(self, X):
        return self.lin0(torch.relu(self.conv2d(X.float().view(-1, 5, 3, 3))).flatten(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, X):
        return self.lin0(self.mha(X.float(), X.float(), X.float())[0])


def config(*modules, **options):
    return LoraConfig(target_modules=list(modules), init_lora_weights=False, **options)


CASES = {
    "same": (MLP, config("lin0"), config("lin0")),
    "different ranks": (MLP, config("lin0", r=4), config("lin0", r=16)),
    "different alpha, rslora": (MLP, config("lin0", lora_alpha=3), config("lin0", use_rslora=True)),
    "both layers": (MLP, config("lin0", "lin1"), config("lin0", "lin1", r=2)),
    "bias": (MLP, config("lin0", lora_bias=True), config("lin0")),
    "dropout": (MLP, config("lin0", lora_dropout=0.5), config("lin0")),
    "different target layers": (MLP, config("lin0"), config("lin1")),
    "overlapping target layers": (MLP, config("lin0"), config("lin0", "lin1")),
    "modules to save": (MLP, config("lin0", modules_to_save=["lin1"]), config("lin0", modules_to_save=["lin1"])),
    "unsupported module to save": (MLPWithGRU, config("lin0", modules_to_save=["gru"]), config("lin0", modules_to_save=["gru"])),
    "embedding and conv1d": (EmbeddingConv1d, config("emb", "conv1d"), config("emb", "conv1d", r=16)),
    "embedding, conv1d, modules to save": (EmbeddingConv1d, *(config("emb", "conv1d", modules_to_save=["lin0"]) for _ in range(2))),
    "conv2d": (Conv2d, config("conv2d"), config("conv2d", r=16)),
    "multihead attention": (Attention, config("mha"), config("mha", r=16)),
    "dora not in the batch": (MLP, config("lin0"), config("lin0", use_dora=True)),
}


def build(name):
    torch.manual_seed(0)
    base, first, second = CASES[name]
    model = get_peft_model(base().eval(), first, "adapter0")
    model.add_adapter("adapter1", second)
    stock = model.eval()
    enabled = copy.deepcopy(stock)
    enable(enabled, verbose=False)
    return stock, enabled.eval()


def outcome(model, names, x):
    try:
        with torch.no_grad():
            return model(X=x, adapter_names=names)
    except Exception as error:
        return error


def rows_for(model):
    return torch.arange(270).view(6, 5, 3, 3) if "Conv2d" in type(model.base_model.model).__name__ else X


@pytest.mark.parametrize("name", CASES)
def test_adapter_names_in_eval(name):
    stock, enabled = build(name)
    x = rows_for(stock)
    which = ["__base__", "adapter0"] if name == "dora not in the batch" else ["__base__", "adapter0", "adapter1"]
    names = [which[i % len(which)] for i in range(len(x))]
    theirs, ours = (outcome(model, names, x) for model in (stock, enabled))
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs) and str(ours) == str(theirs)
        return
    torch.testing.assert_close(ours, theirs)
    for i, single in enumerate(which):
        rows = slice(i, None, len(which))
        with torch.no_grad():
            if single == "__base__":
                with stock.disable_adapter():
                    alone = stock(X=x)
            else:
                stock.set_adapter(single)
                alone = stock(X=x)
        torch.testing.assert_close(ours[rows], alone[rows])


@pytest.mark.parametrize("names", [["__base__"] * 5, ["adapter0"] * 5 + ["absent"] * 4], ids=["too few", "unknown name"])
def test_wrong_adapter_names(names):
    stock, enabled = build("same")
    theirs, ours = (outcome(model, names, X) for model in (stock, enabled))
    assert isinstance(theirs, ValueError) and type(ours) is type(theirs) and str(ours) == str(theirs)


def test_disabled_adapters_win_over_names():
    stock, enabled = build("same")
    names = ["__base__", "adapter0", "adapter1"] * 3
    with enabled.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(enabled(X=X, adapter_names=names), enabled(X=X))
        torch.testing.assert_close(enabled(X=X), _base(stock))


def _base(model):
    with model.disable_adapter():
        return model(X=X)


def test_merged_adapters_refuse_names():
    stock, enabled = build("same")
    for model in (stock, enabled):
        model.merge_adapter(["adapter0"])
    theirs, ours = (outcome(model, ["adapter0"] * 9, X) for model in (stock, enabled))
    assert isinstance(theirs, ValueError) and str(ours) == str(theirs)


def test_training_one_batch_is_training_each_adapter_alone():
    """What stock PEFT refuses: per-adapter gradients of a mixed batch against stock PEFT on that adapter's rows."""
    stock, enabled = build("both layers")
    enabled.train()
    enable(enabled, train=["adapter0", "adapter1"], verbose=False)
    ids, target = torch.tensor([0, 1, -1] * 3), torch.arange(9) % 2
    with adapters(ids):
        nn.functional.nll_loss(enabled(X=X), target, reduction="sum").backward()
    for i, name in enumerate(("adapter0", "adapter1")):
        stock.set_adapter(name)
        stock.zero_grad()
        nn.functional.nll_loss(stock(X=X[ids == i]), target[ids == i], reduction="sum").backward()
        alone = {key: p.grad for key, p in stock.named_parameters() if f".{name}." in key}
        mixed = {key: p.grad for key, p in enabled.named_parameters() if f".{name}." in key}
        assert alone and alone.keys() == mixed.keys()
        for key in alone:
            torch.testing.assert_close(mixed[key], alone[key], rtol=1e-4, atol=1e-5)
