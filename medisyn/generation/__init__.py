"""Making synthetic images: folders of traceable PNGs from a pipeline.

- :mod:`.synthesize`: requests to images, one seed per image.
- :mod:`.strategies`, :mod:`.manifold_requests`: requests for images that are made of real ones.
- :mod:`.embedding_space`, :mod:`.embedding_prior`: moving between image embeddings, and drawing new ones.
- :mod:`.output_folder`: what is finished, so that a run can be continued; `metadata.jsonl`.
- :mod:`.schedulers`: samplers by name.
- :mod:`.grid`: the labelled overview `grid.png`.
- :mod:`.provenance`: what each PNG says about its own origin.

    from medisyn.generation.provenance import read_provenance
    read_provenance("outputs/00000_brain_mri.png")["seed"]
"""
