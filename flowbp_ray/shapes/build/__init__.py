"""How the committed models were trained; ``pipelines/build_shapes.py`` runs these stages."""
