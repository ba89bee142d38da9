_base_ = ['../groupmamba-tiny_8xb128_in1k.py']

# eight groups, eight directions: those of Eq. 6, and the same on the mirrored grid, which the paper
# does not name
model = dict(
    backbone=dict(
        num_groups=8,
        directions=(
            'left-right',
            'right-left',
            'top-bottom',
            'bottom-top',
            'left-right-mirrored',
            'right-left-mirrored',
            'top-bottom-mirrored',
            'bottom-top-mirrored',
        ),
    )
)
