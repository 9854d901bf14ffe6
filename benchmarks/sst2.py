"""The README's SST-2 table: every method by `recipes/run_glue.py`, the same steps and batches, several seeds.

    python benchmarks/sst2.py --model_name_or_path MODEL [--dataset_dir GLUE] [--jobs 2]

Writes `benchmarks/results/sst2.json` and prints the table; see `studies.study`.
"""

from studies import Method, study

SEEDS = (0, 1, 2)
STOMPP_STE = Method("StoMPP + STE (W1A1)", "sst2_minilm_stompp_ste", seeds=SEEDS)
METHODS = [
    Method("full precision", "sst2_minilm_fp"),
    Method("StoMPP, weights only (W1A32)", "sst2_minilm_weights_only"),
    Method("STE baseline (W1A1)", "sst2_minilm_ste", seeds=SEEDS),
    Method("StoMPP, STE-free (W1A1)", "sst2_minilm_stompp"),
    STOMPP_STE,
]

if __name__ == "__main__":
    study("sst2", str(__doc__), "run_glue", METHODS)
