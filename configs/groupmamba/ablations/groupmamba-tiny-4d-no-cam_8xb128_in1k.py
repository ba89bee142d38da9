_base_ = ['./groupmamba-tiny-no-cam_8xb128_in1k.py']

# Fig. 4, "4-D scanning": every channel in all four directions, the parameters as before
model = dict(backbone=dict(share_directions=True))
