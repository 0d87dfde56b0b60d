"""Stable Diffusion (Rombach et al., 2022): a pipeline of diffusers on genkern's kernels."""


class StableDiffusion:
    """Text to image by diffusion in the latent space of an autoencoder, guided by CLIP's text encoder.

        pipe = StableDiffusion.from_pretrained("folder")
        image = pipe("a lighthouse at dusk", num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images[0]

    The folder is one of diffusers: model_index.json and a folder each for unet, vae, text_encoder, tokenizer and scheduler. What is
    returned is diffusers' pipeline, fused: every step of its scheduler is one kernel, and group norm with SiLU in the UNet and the
    autoencoder is another. Needs diffusers and transformers.
    """

    @classmethod
    def from_pretrained(cls, folder, **kwargs):
        """The pipeline in `folder`, fused; kwargs as diffusers' from_pretrained takes them (torch_dtype=..., variant=...)."""
        try:
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise ImportError("StableDiffusion needs diffusers: pip install diffusers transformers") from error
        from genkern.integrations.diffusers import fuse

        return fuse(DiffusionPipeline.from_pretrained(folder, **kwargs))
