"""Every stage against a plain reference loop, on the same work: seconds, ratio, the machine's limit, peak memory.

python -m speed                        # one table, on a machine that does nothing else
python -m speed --scale tiny           # only whether both give the same answers, in seconds
python -m speed --only validation      # one stage
python -m speed --profile              # where our time goes
python -m speed --device cuda          # both sides on a GPU: what its events say, and its own peak of memory
"""

from engine.script import run_script
from speed import (
    bench_alignment,
    bench_base_training,
    bench_data,
    bench_feature_space,
    bench_last_block,
    bench_related_base,
    bench_start,
    bench_validation,
)
from speed.common import run

BENCHES = {
    "base_training": bench_base_training.BENCH,
    "validation": bench_validation.BENCH,
    "related_base": bench_related_base.BENCH,
    "alignment": bench_alignment.BENCH,
    "feature_space": bench_feature_space.BENCH,
    "last_block": bench_last_block.BENCH,
}
OTHERS = {"start": bench_start.rows, "data": bench_data.rows}

if __name__ == "__main__":
    run_script(lambda: run(BENCHES, OTHERS, __doc__.splitlines()[0]))
