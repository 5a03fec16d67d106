"""Models of MONAI."""

from __future__ import annotations

from zoo.registry import entry
from zoo.sizes import image, volume


@entry("monai")
def monai_unet():
    from monai.networks.nets import UNet

    model = UNet(
        spatial_dims=2, in_channels=1, out_channels=3, channels=(8, 16, 24, 32), strides=(2, 2, 2), num_res_units=2
    )
    return model, (image(32, 1),), {}


@entry("monai", slow=True)
def monai_basic_unet():
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=3, features=(8, 8, 16, 16, 32, 8)), (volume(),), {}


@entry("monai")
def monai_attention_unet():
    from monai.networks.nets import AttentionUnet

    model = AttentionUnet(spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2))
    return model, (image(32, 1),), {}


@entry("monai")
def monai_segresnet():
    from monai.networks.nets import SegResNet

    return SegResNet(spatial_dims=3, init_filters=8, blocks_down=(1, 2, 2), blocks_up=(1, 1)), (volume(16),), {}


@entry("monai")
def monai_dynunet():
    from monai.networks.nets import DynUNet

    model = DynUNet(
        spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3, 3], strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2], filters=[8, 16, 24, 32],
    )  # fmt: skip
    return model, (image(32, 1),), {}


@entry("monai", slow=True)
def monai_dynunet_deep():
    from monai.networks.nets import DynUNet

    model = DynUNet(
        spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3, 3], strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2], filters=[8, 16, 24, 32], deep_supervision=True, res_block=True,
    )  # fmt: skip
    return model, (image(32, 1),), {}


@entry("monai", slow=True)
def monai_unetr():
    from monai.networks.nets import UNETR

    model = UNETR(
        in_channels=1, out_channels=2, img_size=32, feature_size=8, hidden_size=32, mlp_dim=64, num_heads=4,
        spatial_dims=2,
    )  # fmt: skip
    return model, (image(32, 1),), {}


@entry("monai", slow=True)
def monai_swin_unetr():
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(in_channels=1, out_channels=2, depths=(1, 1, 1, 1), feature_size=12, spatial_dims=2)
    return model, (image(64, 1),), {}


@entry("monai")
def monai_densenet():
    from monai.networks.nets import DenseNet

    model = DenseNet(
        spatial_dims=2, in_channels=1, out_channels=4, init_features=16, growth_rate=8, block_config=(2, 3, 2)
    )
    return model, (image(64, 1),), {}


@entry("monai")
def monai_vae():
    from monai.networks.nets import VarAutoEncoder

    model = VarAutoEncoder(
        spatial_dims=2, in_shape=(1, 32, 32), out_channels=1, latent_size=8, channels=(8, 16, 32), strides=(1, 2, 2)
    )
    return model, (image(32, 1),), {}
