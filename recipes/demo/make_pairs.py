"""Regenerate the pairs of the demo, or generate more of them: another seed gives other scenes of the same splits.

python recipes/demo/make_pairs.py --output_dir more_pairs --seed 1
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pairs import SPLIT_SIZES, generate_pairs

from nli_sft.data.demo import PAIRS

FILES = {"train": "train.parquet", "dev": "validation.parquet", "test": "test.parquet"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=PAIRS)
    parser.add_argument("--seed", type=int, default=0)
    for split, size in SPLIT_SIZES.items():
        parser.add_argument(f"--{split}", type=int, default=size, help=f"number of {split} pairs")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, file in FILES.items():
        pairs = generate_pairs(split, getattr(args, split), args.seed)
        table = pa.Table.from_pylist(pairs)
        pq.write_table(table, args.output_dir / file, compression="zstd", compression_level=19)
        print(f"{args.output_dir / file}: {len(pairs):,} pairs")


if __name__ == "__main__":
    main()
