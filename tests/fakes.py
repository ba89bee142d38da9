"""Plain PyTorch in the place of mamba-ssm and causal-conv1d, with their layouts and demands."""

import sys
import types

import torch
import torch.nn.functional as F


def _require(condition, message):
    if not condition:
        raise RuntimeError(message)


def selective_scan_fn(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """u, delta (B, D, L); A (D, N); B, C (B, G, N, L); D (D,). Token by token.

    It refuses what the CUDA extension refuses, apart from fp64 and tensors on a CPU.
    """
    batch, channels, length = u.shape
    groups, d_state = B.shape[1:3]
    _require(delta.shape == u.shape and A.shape == (channels, d_state), 'u, delta, A')
    _require(B.shape == C.shape == (batch, groups, d_state, length), 'B, C')
    _require(u.dtype == delta.dtype == B.dtype == C.dtype, 'one dtype of u, delta, B, C')
    _require(all(t.stride(-1) == 1 or length == 1 for t in (u, delta, B, C)), 'strides')
    _require(z is None and delta_bias is None and not delta_softplus, 'not what we call')
    repeats = channels // groups
    B, C = (t.repeat_interleave(repeats, dim=1) for t in (B, C))  # (B, D, N, L)
    state, outputs = u.new_zeros(batch, channels, d_state), []
    for t in range(length):
        state = (
            torch.exp(delta[:, :, t, None] * A) * state
            + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        )
        outputs.append((state * C[..., t]).sum(-1))
    y = torch.stack(outputs, -1)
    return y if D is None else y + D[:, None] * u


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """x (B, D, L), weight (D, K), bias (D,)."""
    channels, taps = weight.shape
    _require(2 <= taps <= 4, 'taps')
    _require(x.dim() == 3 and x.shape[1] == channels, 'shape of x')
    _require(x.stride(2) == 1 or x.stride(1) == 1, 'strides of x')
    if x.stride(1) == 1 and x.stride(2) > 1:
        _require(
            channels % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0,
            'channels-last needs multiples of 8',
        )
    _require(activation == 'silu', 'activation')
    padded = F.pad(x.to(weight.dtype), (taps - 1, 0))
    y = sum(weight[:, k, None] * padded[..., k : k + x.shape[2]] for k in range(taps))
    return F.silu(y if bias is None else y + bias[:, None]).to(x.dtype)


def install(monkeypatch, mamba_ssm=True, causal_conv1d=True):
    """Put the fakes, or nothing that can be imported, where the packages would be."""
    from groupmamba_mm.ops import backend

    interface = types.ModuleType('mamba_ssm.ops.selective_scan_interface')
    interface.selective_scan_fn = selective_scan_fn
    conv = types.ModuleType('causal_conv1d')
    conv.causal_conv1d_fn = causal_conv1d_fn
    conv.__version__ = '0.fake'
    package = types.ModuleType('mamba_ssm')
    package.__version__ = '0.fake'
    modules = {
        'mamba_ssm': package if mamba_ssm else None,
        'mamba_ssm.ops': types.ModuleType('mamba_ssm.ops'),
        'mamba_ssm.ops.selective_scan_interface': interface,
        'causal_conv1d': conv if causal_conv1d else None,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    backend.import_problem.cache_clear()
    backend._choose.cache_clear()


def mamba_runs_anywhere(monkeypatch):
    """Take the check of the device away, for the fakes."""
    from groupmamba_mm.ops import backend

    monkeypatch.setattr(backend, '_mamba_problem', lambda device, dtype, d_state: None)
    backend._choose.cache_clear()
