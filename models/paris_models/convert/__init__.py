"""Weights in and out: FLUX.1 and Open-Sora files become experts, experts become such files.

`run.convert` is the one way through: it recognises the source's layout, checks it, and streams it
tensor by tensor into the layout that is asked for (docs/weights.md)::

    from paris_models.convert.run import Target, convert
    convert(Path("flux1-schnell.safetensors"), Path("initial.safetensors"), Target("expert"),
            origin="flux.1-schnell")
"""
