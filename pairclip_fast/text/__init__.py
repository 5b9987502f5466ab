"""The text room: frozen text encoders, the caption bank and its inspection. The only importer of `transformers`.

Start at `bank.bank_for` (what training asks for) or `commands.run_embed` (what `pairclip-fast embed` runs).
"""
