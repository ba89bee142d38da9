"""Both families of GroupMamba, written slowly and independently of the package, in fp64.

``official_forward`` reads tensors by the *released* names, ``paper_forward`` by ours; each unit,
group and token is walked on its own. Images are (B, 3, H, W); tokens here are (B, H, W, C).
"""

import torch
import torch.nn.functional as F

PAPER_ORDER = ('left-right', 'right-left', 'top-bottom', 'bottom-top')
OFFICIAL_ORDER = ('left-right', 'top-bottom', 'right-left', 'bottom-top')


def visiting_order(height, width, direction):
    """Cells (i, j) in the order of a direction."""
    if direction in ('left-right', 'right-left'):
        cells = [(i, j) for i in range(height) for j in range(width)]
    else:
        cells = [(i, j) for j in range(width) for i in range(height)]
    return cells[::-1] if direction in ('right-left', 'bottom-top') else cells


def sequence_of(x, direction):
    """(B, H, W, C) to the list of its (B, C) tokens in the order of a direction."""
    return [x[:, i, j] for i, j in visiting_order(x.shape[1], x.shape[2], direction)]


def grid_of(tokens, like, direction):
    """The inverse of :func:`sequence_of`."""
    out = torch.empty(*like.shape[:3], tokens[0].shape[-1], dtype=like.dtype)
    for (i, j), token in zip(visiting_order(like.shape[1], like.shape[2], direction), tokens):
        out[:, i, j] = token
    return out


def s6(tokens, x_proj, dt_weight, dt_bias, A_log, D):
    """S6 of one group over a list of (B, d) tokens; weights of that group alone."""
    d_state, rank = A_log.shape[1], dt_weight.shape[1]
    A = -torch.exp(A_log)
    h = torch.zeros(tokens[0].shape[0], *A.shape, dtype=tokens[0].dtype)
    out = []
    for x in tokens:
        low, B, C = (x @ x_proj.T).split([rank, d_state, d_state], dim=-1)
        dt = F.softplus(low @ dt_weight.T + dt_bias)
        h = torch.exp(dt[..., None] * A) * h + (dt * x)[..., None] * B[:, None, :]
        out.append((h * C[:, None, :]).sum(-1) + D * x)
    return out


def norm(x, p, name, eps):
    return F.layer_norm(x, x.shape[-1:], p[f'{name}.weight'], p[f'{name}.bias'], eps)


def linear(x, p, name):
    return F.linear(x, p[f'{name}.weight'], p.get(f'{name}.bias'))


def conv(x, p, name, stride=1, groups=1):
    """A convolution of (B, H, W, C) tokens, half padded."""
    weight = p[f'{name}.weight']
    y = F.conv2d(
        x.permute(0, 3, 1, 2),
        weight,
        p.get(f'{name}.bias'),
        stride,
        weight.shape[-1] // 2,
        groups=groups,
    )
    return y.permute(0, 2, 3, 1)


def batch_norm(x, p, name):
    """BatchNorm in eval mode."""
    scale = p[f'{name}.weight'] / torch.sqrt(p[f'{name}.running_var'] + 1e-5)
    return (x - p[f'{name}.running_mean']) * scale + p[f'{name}.bias']


def official_unit(x, p, unit, direction):
    """One SS2D unit."""
    width = x.shape[-1]
    x, z = linear(x, p, f'{unit}.in_proj').split(width, dim=-1)
    x = F.silu(conv(x, p, f'{unit}.conv2d', groups=width))
    tokens = s6(
        sequence_of(x, direction),
        p[f'{unit}.x_proj_weight'][0],
        p[f'{unit}.dt_projs_weight'][0],
        p[f'{unit}.dt_projs_bias'][0],
        p[f'{unit}.A_logs'],
        p[f'{unit}.Ds'],
    )
    y = norm(grid_of(tokens, x, direction), p, f'{unit}.out_norm', 1e-5) * F.silu(z)
    return linear(y, p, f'{unit}.out_proj')


def official_mixer(x, p, attn):
    u = norm(x, p, f'{attn}.norm', 1e-5)
    s = torch.sigmoid(linear(F.relu(linear(u.mean((1, 2)), p, f'{attn}.fc1')), p, f'{attn}.fc2'))
    v = torch.cat(
        [
            official_unit(part, p, f'{attn}.mamba_g{i + 1}', direction)
            for i, (part, direction) in enumerate(zip(u.chunk(4, -1), OFFICIAL_ORDER))
        ],
        -1,
    )
    v = v * p[f'{attn}.skip_scale'] * u * s[:, None, None]
    return linear(norm(v, p, f'{attn}.norm', 1e-5), p, f'{attn}.proj')


def official_forward(image, p):
    """Released model in eval mode: (mean logits, both heads, the stages' outputs)."""
    x = image.permute(0, 2, 3, 1)
    for layer, stride in ((0, 2), (3, 1), (6, 1)):
        x = conv(x, p, f'patch_embed1.conv.{layer}', stride)
        x = F.relu(batch_norm(x, p, f'patch_embed1.conv.{layer + 1}'))
    stages = []
    for stage in (1, 2, 3, 4):
        x = norm(conv(x, p, f'patch_embed{stage}.proj', 2), p, f'patch_embed{stage}.norm', 1e-5)
        depth = len({k.split('.')[1] for k in p if k.startswith(f'block{stage}.')})
        for i in range(depth):
            block = f'block{stage}.{i}'
            x = x + official_mixer(x, p, f'{block}.attn')
            hidden = linear(norm(x, p, f'{block}.norm2', 1e-6), p, f'{block}.mlp.fc1')
            hidden = conv(hidden, p, f'{block}.mlp.dwconv.dwconv', groups=hidden.shape[-1])
            x = x + linear(F.gelu(hidden), p, f'{block}.mlp.fc2')
        stages.append(x)
        if stage < 4:
            x = norm(x, p, f'norm{stage}', 1e-6)
    c = x.mean((1, 2), keepdim=True)
    post = 'post_network.0'
    c = c + norm(official_mixer(c, p, f'{post}.attn'), p, f'{post}.norm1', 1e-6)
    hidden = F.gelu(linear(norm(c, p, f'{post}.norm2', 1e-6), p, f'{post}.mlp.fc1'))
    c = c + linear(hidden, p, f'{post}.mlp.fc2')
    c = norm(c, p, 'norm4', 1e-6)[:, 0, 0]
    heads = linear(c, p, 'head'), linear(c, p, 'dist_head')
    return (heads[0] + heads[1]) / 2, heads, stages


def paper_mamba(x, p, name, group, direction):
    """Mamba block of one group, (B, H, W, d)."""
    inner = p[f'{name}.in_proj.weight'].shape[1] // 2
    channels = slice(group * inner, (group + 1) * inner)
    x, z = (x @ p[f'{name}.in_proj.weight'][group].T).split(inner, dim=-1)
    tokens = sequence_of(x, direction)
    taps, bias = p[f'{name}.conv1d.weight'][channels, 0], p[f'{name}.conv1d.bias'][channels]
    convolved = []
    for t in range(len(tokens)):
        y = bias
        for back in range(taps.shape[1]):
            if t >= back:
                y = y + taps[:, taps.shape[1] - 1 - back] * tokens[t - back]
        convolved.append(F.silu(y))
    ssm = f'{name}.ssm'
    y = s6(
        convolved,
        p[f'{ssm}.x_proj_weight'][group],
        p[f'{ssm}.dt_proj_weight'][group],
        p[f'{ssm}.dt_proj_bias'][group],
        p[f'{ssm}.A_log'][group],
        p[f'{ssm}.D'][channels],
    )
    y = grid_of(y, x, direction) * F.silu(z)
    return y @ p[f'{name}.out_proj.weight'][group].T


def paper_vsss(x, p, name, group, direction):
    """VSSS block of one group (Eq. 4), (B, H, W, d)."""
    width = x.shape[-1]
    channels = slice(group * width, (group + 1) * width)

    def group_norm(x, layer):
        return F.layer_norm(
            x, (width,), p[f'{layer}.weight'][channels], p[f'{layer}.bias'][channels], 1e-5
        )

    def group_linear(x, layer):
        return x @ p[f'{layer}.weight'][group].T + p[f'{layer}.bias'][group]

    x = x + paper_mamba(group_norm(x, f'{name}.norm1'), p, f'{name}.mamba', group, direction)
    hidden = F.gelu(group_linear(group_norm(x, f'{name}.norm2'), f'{name}.ffn.fc1'))
    return x + group_linear(hidden, f'{name}.ffn.fc2')


def paper_layer(x, p, name):
    """Eq. 3."""
    x_gm = torch.cat(
        [
            paper_vsss(part, p, f'{name}.vsss', group, direction)
            for group, (part, direction) in enumerate(zip(x.chunk(4, -1), PAPER_ORDER))
        ],
        -1,
    )
    hidden = F.relu(linear(x.mean((1, 2)), p, f'{name}.affinity.fc1'))
    x_cam = x_gm * torch.sigmoid(linear(hidden, p, f'{name}.affinity.fc2'))[:, None, None]
    hidden = F.gelu(linear(norm(x_cam, p, f'{name}.norm', 1e-5), p, f'{name}.ffn.fc1'))
    return x + linear(hidden, p, f'{name}.ffn.fc2')


def paper_forward(image, p):
    """The paper's backbone in eval mode: (feature vector, the stages' outputs)."""
    x = conv(image.permute(0, 2, 3, 1), p, 'stem.convs.0', 2)
    x = conv(F.relu(batch_norm(x, p, 'stem.convs.1')), p, 'stem.convs.3', 2)
    x = norm(x, p, 'stem.norm', 1e-5)
    stages = []
    for stage in range(4):
        if stage > 0:
            name = f'downsamples.{stage - 1}'
            x = norm(conv(x, p, f'{name}.convs', 2), p, f'{name}.norm', 1e-5)
        depth = len({k.split('.')[2] for k in p if k.startswith(f'stages.{stage}.')})
        for i in range(depth):
            x = paper_layer(x, p, f'stages.{stage}.{i}')
        stages.append(x)
    return norm(x.mean((1, 2)), p, 'summary.norm', 1e-5), stages
