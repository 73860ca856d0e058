"""enable, adapters and what PEFT does to an enabled model, against stock PEFT."""

import copy
import gc
import threading

import pytest
import torch
from tiny_models import IDS, base_model, layers, lora, lora_grads, mixed_step, names, pair, tokens, wrap
from peft import PeftModel
from torch import nn

from mtkernels.integrations import adapters, disable, enable

def stock_solo_grads(stock, ids, x):
    """The same loss by stock PEFT: one adapter and its rows at a time."""
    grads = {}
    for i, name in enumerate(names(stock)):
        stock.zero_grad()
        stock.set_adapter(name)
        logits = stock(input_ids=x[ids == i]).logits
        weight = torch.linspace(-1, 1, logits[0].numel()).view_as(logits[0])
        (logits.float() * weight).sum().backward()
        grads.update({k: g for k, g in lora_grads(stock).items() if f".{name}." in k})
    return grads


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_mixed_training_matches_solo_stock_peft(kind):
    stock, enabled = pair(kind)
    x = tokens()
    _, got = mixed_step(enabled, IDS, x)
    want = stock_solo_grads(stock, IDS, x)
    assert got.keys() == want.keys() and len(got) > 20
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5, msg=key)


def test_stock_refuses_what_enabled_trains():
    stock, enabled = pair()
    x, wanted = tokens(), ["ad1", "ad0", "__base__", "ad3", "ad2", "ad1"]
    stock.train(), enabled.train()
    with pytest.raises(ValueError, match="training mode"):
        stock(input_ids=x, adapter_names=wanted)
    loss = enabled(input_ids=x, labels=x, adapter_names=wanted).loss
    loss.backward()
    by_names = lora_grads(enabled)
    enabled.zero_grad()
    with adapters(IDS):
        enabled(input_ids=x, labels=x).loss.backward()
    assert all(torch.equal(g, by_names[k]) for k, g in lora_grads(enabled).items())


def test_mixed_batch_is_bitwise_the_solo_batch():
    stock, enabled = pair(configs=[lora(4, lora_dropout=0.3), lora(7), lora(2, lora_dropout=0.1)])
    x, ids = tokens(), torch.tensor([2, 0, 1, 0, -1, 2])
    torch.manual_seed(3)
    mixed_logits, mixed = mixed_step(enabled, ids, x)
    for i, name in enumerate(names(enabled)):
        torch.manual_seed(3)
        rows = torch.where(ids == i, ids, -1)  # everybody else becomes a base row: same GEMM shapes, other company
        logits, solo = mixed_step(enabled, rows, x)
        assert torch.equal(logits[ids == i], mixed_logits[ids == i])
        mine = [k for k in solo if f".{name}." in k]
        assert mine and all(torch.equal(solo[k], mixed[k]) for k in mine)


def test_absent_adapters_get_zero_gradients():
    _, enabled = pair()
    _, grads = mixed_step(enabled, [0, 0, 0, 0, -1, -1], tokens())
    absent = [g for k, g in grads.items() if ".ad0." not in k]
    assert absent and all(not g.any() for g in absent)
    assert all(p.grad is not None for n, p in enabled.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_eval_agrees_with_stock_mixed_batches(kind):
    stock, enabled = pair(kind)
    wanted, x = ["ad3", "ad0", "__base__", "ad2", "ad2", "ad1"], tokens()
    with torch.no_grad():
        want = stock.eval()(input_ids=x, adapter_names=wanted).logits
        assert not torch.allclose(want, stock(input_ids=x).logits, atol=1e-3)
        torch.testing.assert_close(enabled.eval()(input_ids=x, adapter_names=wanted).logits, want, rtol=1e-5, atol=1e-5)
        for ids in (wanted, [3, 0, -1, 2, 2, 1], ["ad3", 0, -1, 2, "ad2", 1]):
            with adapters(ids):
                torch.testing.assert_close(enabled(input_ids=x).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("active", ["ad0", "ad2", ["ad0", "ad1"], ["ad1", "ad2", "ad3"]])
def test_active_adapters_add_up_like_stock(active):
    stock, enabled = pair()
    for model in (stock, enabled):
        model.base_model.set_adapter(active)
    x = tokens()
    out = [model(input_ids=x, labels=x) for model in (stock, enabled)]
    for o in out:
        o.loss.backward()
    torch.testing.assert_close(out[1].logits, out[0].logits, rtol=1e-5, atol=1e-5)
    want, got = lora_grads(stock), lora_grads(enabled)
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-6, msg=key)


def test_state_dict_and_modules_stay():
    stock, enabled = pair()
    a, b = stock.state_dict(), enabled.state_dict()
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert [n for n, _ in stock.named_modules()] == [n for n, _ in enabled.named_modules()]
    assert [n for n, _ in stock.named_buffers()] == [n for n, _ in enabled.named_buffers()]
    assert repr(layers(enabled)[0]).startswith("lora.")
    disable(enabled)
    assert [type(m) for m in stock.modules()] == [type(m) for m in enabled.modules()]
    for m in enabled.modules():
        assert not m._forward_pre_hooks and not m._forward_pre_hooks_with_kwargs and "_mtkernels" not in vars(m)


def test_saved_after_training_loads_in_stock_peft(tmp_path):
    _, enabled = pair()
    x = tokens()
    optimizer = torch.optim.SGD([p for p in enabled.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        with adapters(IDS):
            enabled(input_ids=x, labels=x).loss.backward()
        optimizer.step()
    enabled.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "ad0", adapter_name="ad0").eval()
    for name in names(enabled)[1:]:
        loaded.load_adapter(tmp_path / name, adapter_name=name)
    wanted = ["ad1", "ad0", "__base__", "ad3", "ad2", "ad1"]
    with torch.no_grad(), adapters(IDS):
        got = enabled.eval()(input_ids=x).logits
    torch.testing.assert_close(got, loaded(input_ids=x, adapter_names=wanted).logits, rtol=1e-5, atol=1e-5)


def test_enable_twice_copy_and_pickle(tmp_path):
    _, enabled = pair()
    again = enable(enabled, verbose=False)
    assert len(again.swapped) == len(layers(enabled)) == 6 and not again.declined
    x = tokens()
    torch.save(enabled, tmp_path / "model.pt")
    loaded, copied = torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(enabled)
    assert layers(copied)[0]._mtkernels.model is not layers(enabled)[0]._mtkernels.model
    part = copy.deepcopy(layers(enabled)[0])
    assert part._mtkernels.model is layers(enabled)[0]._mtkernels.model
    with torch.no_grad():
        with adapters(IDS):
            want = enabled(input_ids=x).logits
            with pytest.raises(RuntimeError, match="call mtkernels.enable"):
                loaded(input_ids=x)
        enable(loaded, verbose=False)
        with adapters(IDS):
            assert torch.equal(loaded(input_ids=x).logits, want) and torch.equal(copied(input_ids=x).logits, want)


def test_packed_and_flat_rows_take_per_token_ids():
    _, enabled = pair()
    x = tokens(3, 5)
    with torch.no_grad():
        with adapters(torch.tensor([[0] * 5, [1] * 5, [3] * 5])):
            per_token = enabled(input_ids=x).logits
        with adapters(torch.tensor([0, 1, 3])):
            torch.testing.assert_close(per_token, enabled(input_ids=x).logits)
    packed, position = x.view(1, -1), torch.arange(5).repeat(3)[None]
    per_token_ids = torch.tensor([0, 1, 3]).repeat_interleave(5)[None]
    layer = layers(enabled)[0]
    hidden = torch.randn(1, 15, 32)
    with torch.no_grad(), adapters(per_token_ids):
        flat = layer(hidden[0])
        torch.testing.assert_close(layer(hidden)[0], flat)
    with torch.no_grad(), adapters(per_token_ids[0]):
        torch.testing.assert_close(layer(hidden[0]), flat)
    with adapters(per_token_ids):
        enabled(input_ids=packed, position_ids=position, labels=packed).loss.backward()
    assert all(g.any() for k, g in lora_grads(enabled).items() if ".ad1." in k and "lora_B" in k)


def test_blocks_nest_restore_and_stay_in_their_thread():
    _, enabled = pair()
    x = tokens()
    run = torch.no_grad()(lambda: enabled(input_ids=x).logits)
    active = run()
    with torch.no_grad():
        with adapters(1):
            one = run()
            with adapters("ad3"):
                three = run()
            with pytest.raises(KeyError):
                with adapters(0):
                    raise KeyError
            assert torch.equal(run(), one) and not torch.equal(one, three)
            seen = []
            thread = threading.Thread(target=lambda: seen.append(run()))
            thread.start(), thread.join()
            assert torch.equal(seen[0], active)
    assert torch.equal(run(), active)


BAD_IDS = {
    "length": ([0, 1], ValueError, r"q_proj: adapter ids are \(2,\).*one id per sequence \(6,\) or per token \(6, 9\)"),
    "name": (["ad0"] * 5 + ["nope"], ValueError, "no adapter 'nope'; the model has 0 'ad0'"),
    "range": ([0, 1, 2, 3, 4, 0], IndexError, "id 4 is out of range"),
    "negative": (torch.tensor([0, 0, 0, 0, 0, -2]), IndexError, "id -2 is out of range"),
    "float": (torch.zeros(6), TypeError, "float32; give int32 or int64"),
    "float list": ([0.0] * 6, TypeError, "a float"),
    "bool": ([True] * 6, TypeError, "a bool"),
    "ragged": ([[0, 1], [0]], ValueError, "differ in length"),
    "none": (None, TypeError, "a NoneType"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids(case):
    _, enabled = pair()
    ids, error, match = BAD_IDS[case]
    with pytest.raises(error, match=match), adapters(ids):
        enabled(input_ids=tokens())
    enabled(input_ids=tokens())


def test_frozen_adapter_in_the_batch_raises_in_grad_mode():
    model = wrap(base_model(), [lora(4), lora(2)])
    enable(model, verbose=False)
    with pytest.raises(RuntimeError, match=r"'ad1' would not train.*train=\['ad1'\]"), adapters([0, 1]):
        model(input_ids=tokens(2))
    with torch.no_grad(), adapters([0, 1]):
        model(input_ids=tokens(2))
    enable(model, train="ad1", verbose=False)
    with adapters([0, 1]):
        model(input_ids=tokens(2))
    with pytest.raises(ValueError, match="train names 'x'"):
        enable(model, train=["x"], verbose=False)


def test_changes_after_enable_are_seen():
    """Each step changes both models through PEFT and compares; the last adapter also brings layers that were never enabled."""
    stock, enabled = pair()
    x, models = tokens(), (stock.eval(), enabled.eval())
    wanted = ["ad0", "ad1", "__base__", "ad1", "ad0", "ad1"]

    def both(change):
        for model in models:
            torch.manual_seed(7)
            change(model)

    def compare(mixed=True):
        with torch.no_grad():
            torch.testing.assert_close(enabled(input_ids=x).logits, stock(input_ids=x).logits, rtol=1e-4, atol=1e-5)
            if mixed:
                want = stock(input_ids=x, adapter_names=wanted).logits
                with adapters(wanted):
                    torch.testing.assert_close(enabled(input_ids=x).logits, want, rtol=1e-4, atol=1e-5)

    both(lambda m: [layer.set_scale("ad1", 3.0) for layer in layers(m)])
    compare()
    both(lambda m: m.set_adapter("ad1"))
    compare()
    both(lambda m: m.delete_adapter("ad2"))
    compare()
    both(lambda m: m.merge_adapter())
    compare(mixed=False)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"q_proj.*'ad1' are merged.*unmerge_adapter"), adapters(wanted):
        enabled(input_ids=x)
    both(lambda m: m.unmerge_adapter())
    compare()
    with stock.disable_adapter(), enabled.disable_adapter():
        with torch.no_grad(), adapters(wanted):
            torch.testing.assert_close(enabled(input_ids=x).logits, stock(input_ids=x).logits)
    both(lambda m: m.add_adapter("new", lora(3, ["k_proj", "q_proj", "lm_head"], lora_bias=True)))
    wanted = ["new", "ad1", "__base__", "new", "ad0", "ad3"]
    compare()
    assert type(enabled.base_model.model.model.layers[0].self_attn.k_proj).__name__ == "MtLoraLinear"
    both(lambda m: m.to(torch.float64))
    compare()


def test_base_that_is_not_a_plain_linear_runs_lora_delta():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    stock = wrap(base, [lora(4, ["c_attn"], fan_in_fan_out=True), lora(3, ["c_attn"], fan_in_fan_out=True)]).eval()
    enabled = copy.deepcopy(stock)
    report = enable(enabled, train=["ad0", "ad1"], verbose=False)
    assert report.swapped[0].now.startswith("lora_delta")
    x = tokens(3)
    with adapters([1, -1, 0]):
        got = enabled(input_ids=x).logits
    torch.testing.assert_close(got, stock(input_ids=x, adapter_names=["ad1", "__base__", "ad0"]).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_low_precision_base(lora_dtype):
    configs = [lora(4), lora(2)]
    stock = wrap(base_model().bfloat16(), configs).eval()
    for n, p in stock.named_parameters():
        if "lora_" in n:
            p.data = p.data.to(lora_dtype)
    enabled = copy.deepcopy(stock)
    enable(enabled, train=["ad0", "ad1"], verbose=False)
    layer, reference = layers(enabled)[0], layers(stock)[0]
    h = torch.randn(2, 5, 32).bfloat16()
    with torch.no_grad(), adapters([1, 0]):
        got = layer(h)
    want = reference(h, adapter_names=["ad1", "ad0"])
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_autocast_like_linear():
    stock, enabled = pair()
    h = torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        want = layers(stock)[0](h)
        got = layers(enabled)[0](h)
        with adapters([0, 0]):
            mixed = layers(enabled)[0](h)
    assert got.dtype == mixed.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert torch.equal(got, mixed)


def test_dropout_follows_mode_seed_and_micro_batch():
    _, enabled = pair(configs=[lora(4, lora_dropout=0.5), lora(4)])
    x, run = tokens(2), torch.no_grad()(lambda ids: enabled.train()(input_ids=x).logits)

    def mixed(ids):
        with torch.no_grad(), adapters(ids):
            return enabled(input_ids=x).logits

    enabled.train()
    a, b = mixed([0, 1]), mixed([0, 1])
    assert not torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    torch.manual_seed(2)
    a = mixed([0, 1])
    torch.manual_seed(2)
    assert torch.equal(mixed([0, 1]), a)
    assert not torch.equal(run(None), run(None))
    enabled.eval()
    assert torch.equal(mixed([0, 1]), mixed([0, 1]))
    for layer in layers(enabled.train()):
        layer.lora_dropout["ad0"] = nn.Identity()
    assert torch.equal(mixed([0, 1]), mixed([0, 1]))


def test_zero_dropout_draws_nothing_from_the_generator():
    _, enabled = pair()
    state = torch.get_rng_state()
    mixed_step(enabled.train(), IDS, tokens())
    enabled(input_ids=tokens())
    assert torch.equal(state, torch.get_rng_state())


def test_two_models_read_the_same_block_their_own_way():
    _, first = pair()
    second = wrap(base_model(), [lora(2), lora(3)])
    enable(second, verbose=False)
    x = tokens()
    with torch.no_grad(), adapters(["ad3"] * 6):
        first(input_ids=x)
        with pytest.raises(ValueError, match="no adapter 'ad3'; the model has 0 'ad0', 1 'ad1'"):
            second(input_ids=x)


def test_a_model_that_is_gone_does_not_disturb_the_others():
    from mtkernels.integrations.context import _MODELS

    _, gone = pair()
    _, enabled = pair()
    state = next(m for m in layers(gone))._mtkernels.model
    del gone
    gc.collect()
    assert state.root() is None and state in _MODELS
    with torch.no_grad(), adapters(IDS):
        enabled(input_ids=tokens())
