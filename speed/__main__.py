"""Every stage against a plain reference loop, on the same work: seconds, ratio, the machine's limit, peak memory.

python -m speed                        # everything, on a machine that does nothing else
python -m speed --scale tiny           # only whether both give the same answers, in seconds
python -m speed --only validation      # one stage
python -m speed --profile              # where our time goes
python -m speed --device cuda          # both sides on a GPU: what its events say, and its own peak of memory
"""

from engine.script import run_script
from speed import bench_alignment, bench_base_training, bench_meta_learning, bench_related_base, bench_validation
from speed.common import run

BENCHES = [module.BENCH for module in (bench_base_training, bench_validation, bench_related_base, bench_alignment)]
BENCHES += bench_meta_learning.BENCHES

if __name__ == "__main__":
    run_script(lambda: run(BENCHES, __doc__.splitlines()[0]))
