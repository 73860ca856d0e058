"""lora_merge_ and lora_unmerge_: fold adapters of a bank into the weight of their layer, in place, and take them out again."""

import torch

from .bank import KERNEL_DTYPES, LoraBank

# Elements of the weight that exist in float32 (or float64) at a time.
CHUNK_ELEMENTS = 1 << 24


def lora_merge_(weight, bank, adapters, *, bias=None, transposed=False, allow_nonfinite=False):
    """weight += sum_i c_i s_i B_i A_i and, for adapters with a bias, bias += sum_i c_i s_i beta_i. Returns None.

    weight: [O, D] (Parameter or plain tensor, any strides), float32/bfloat16/float16/float64; written in place.
    transposed: the weight is [D, O]: Conv1D, PEFT's fan_in_fan_out, and the [V, O] table of an embedding.
    adapters: an index into the bank, a list of indices, or {index: coefficient c}. bias: [O] of the layer, written in
    place; needed when a chosen adapter has a bias. Products and sums are in float32 (float64 for float64 inputs),
    in the order given, whatever autocast says, and each element is rounded once to the dtype of weight.
    allow_nonfinite: write whatever comes out. By default the whole result is checked first (one more pass, and the host
    waits for the device); if it has an inf or NaN, ValueError is raised and nothing is written.

    Merging and unmerging is no exact round trip: each rounds to the dtype of weight, so an element may come back one or
    two of its units in the last place off, and a bfloat16 weight forgets a part of the adapter smaller than that. Keep
    `weight.clone()` and copy it back where bits matter. A layer with DoRA also needs its rows scaled: dora_scale.
    Raises TypeError/ValueError naming what does not fit, for quantised, integer and distributed weights among others.
    """
    _merge("lora_merge_", 1.0, weight, bank, adapters, bias, transposed, allow_nonfinite)


def lora_unmerge_(weight, bank, adapters, *, bias=None, transposed=False, allow_nonfinite=False):
    """weight -= sum_i c_i s_i B_i A_i, what lora_merge_ with these arguments added, up to its rounding. Returns None."""
    _merge("lora_unmerge_", -1.0, weight, bank, adapters, bias, transposed, allow_nonfinite)


def _merge(op, sign, weight, bank, adapters, bias, transposed, allow_nonfinite):
    if not isinstance(bank, LoraBank):
        raise TypeError(f"{op}: bank is a {type(bank).__name__}; build one with LoraBank.from_factors(A, B, scale)")
    chosen = {i: sign * c for i, c in _coefficients(op, adapters, len(bank)).items()}
    _check_weight(op, "weight", weight, bank)
    shape = (bank.out_features, bank.in_features)
    if weight.shape != (shape[::-1] if transposed else shape):
        hint = f"; pass transposed={not transposed}" if weight.shape == (shape if transposed else shape[::-1]) else ""
        raise ValueError(f"{op}: weight is {tuple(weight.shape)}, the bank maps {shape[1]} -> {shape[0]} with transposed={transposed}{hint}")
    beta = _chosen_bias(op, bank, chosen, bias)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        pairs = _pairs(weight, bank, chosen, transposed)
        parts = list(_parts(weight, pairs))
        total = None if beta is None else bias.to(beta.dtype) + beta
        if not allow_nonfinite:
            _check_finite(op, weight, pairs, parts, chosen, bias, total)
        for part in parts:
            weight[part].copy_(_merged(weight, pairs, part))
        if total is not None:
            bias.copy_(total)


def _coefficients(op, adapters, n):
    if isinstance(adapters, dict):
        chosen = adapters
    else:
        indices = [adapters] if isinstance(adapters, int) else list(adapters)
        if len(set(indices)) != len(indices):
            raise ValueError(f"{op}: adapters {indices} repeat one; give a dict of coefficients")
        chosen = dict.fromkeys(indices, 1.0)
    if not all(isinstance(i, int) and 0 <= i < n for i in chosen):
        raise ValueError(f"{op}: adapters are {list(chosen)}; the bank has 0..{n - 1}")
    return chosen


def _check_weight(op, name, t, bank):
    if type(t) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"{op}: {name} is a {type(t).__name__}; dequantise or gather it into a plain tensor, merge, and convert it back")
    if t.dtype not in KERNEL_DTYPES:
        raise TypeError(f"{op}: {name} is {t.dtype}, which is quantised or no float; dequantise it to float32 or bfloat16, merge, and quantise again")
    if t.device != bank.device:
        raise ValueError(f"{op}: {name} is on {t.device}, the bank on {bank.device}; move them to one device")


def _chosen_bias(op, bank, chosen, bias):
    """sum_i c_i s_i beta_i [O], or None."""
    terms = [(i, c) for i, c in chosen.items() if bank.bias and bank.bias[i].numel()]
    if not terms:
        return None
    if bias is None:
        raise ValueError(f"{op}: adapters {[i for i, _ in terms]} have a bias; pass the layer's bias, or give the layer one first")
    _check_weight(op, "bias", bias, bank)
    if bias.shape != (bank.out_features,):
        raise ValueError(f"{op}: bias is {tuple(bias.shape)}; give [{bank.out_features}]")
    with torch.no_grad():
        dtype = _wide(bias, bank)
        return sum(c * bank.scale[i].to(dtype) * bank.bias[i].to(dtype) for i, c in terms)


def _wide(t, bank):
    return torch.promote_types(torch.promote_types(t.dtype, bank.dtype), torch.float32)


def _pairs(weight, bank, chosen, transposed):
    """Factors (left [rows, R], right [R, columns]) whose products add up to what is merged."""
    dtype, A, B, found = _wide(weight, bank), bank.A, bank.B, []
    for i, c in chosen.items():
        a, b = A[i].to(dtype), B[i].to(dtype) * (c * bank.scale[i].to(dtype))
        found.append((a.T, b.T) if transposed else (b, a))
    return found


def _parts(weight, pairs):
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    return (slice(begin, begin + step) for begin in range(0, weight.shape[0] if pairs else 0, step))


def _merged(weight, pairs, part):
    """These rows of the result, before rounding."""
    delta = pairs[0][0][part] @ pairs[0][1]
    for left, right in pairs[1:]:
        delta.addmm_(left[part], right)
    return delta.add_(weight[part])


def _check_finite(op, weight, pairs, parts, chosen, bias, total):
    finite = [torch.isfinite(_merged(weight, pairs, part).to(weight.dtype)).all() for part in parts]
    finite += [] if total is None else [torch.isfinite(total.to(bias.dtype)).all()]
    if finite and not bool(torch.stack(finite).all()):
        raise ValueError(f"{op}: adapters {list(chosen)} give weights that are not finite, so nothing was written; pass allow_nonfinite=True to write them")
