"""`fastrl verify`: check every operation on every backend that this machine can run.

judge.py    the rule: how large an error may be, and the verdict
checks.py   the checks, operation by operation
run.py      all checks on all devices and backends, as a table
"""

from fastrl.verify.judge import PIECE as PIECE
from fastrl.verify.judge import ROUNDINGS as ROUNDINGS
from fastrl.verify.judge import Disagreement as Disagreement
from fastrl.verify.judge import Look as Look
from fastrl.verify.judge import Named as Named
from fastrl.verify.judge import Parts as Parts
from fastrl.verify.judge import Setting as Setting
from fastrl.verify.judge import Verdict as Verdict
from fastrl.verify.judge import budget as budget
from fastrl.verify.judge import judged as judged
from fastrl.verify.judge import max_error as max_error
from fastrl.verify.judge import same_bits as same_bits
from fastrl.verify.judge import worst as worst
from fastrl.verify.run import BACKENDS as BACKENDS
from fastrl.verify.run import COLUMNS as COLUMNS
from fastrl.verify.run import FAIL as FAIL
from fastrl.verify.run import NOT_RUN as NOT_RUN
from fastrl.verify.run import PASS as PASS
from fastrl.verify.run import Check as Check
from fastrl.verify.run import counts as counts
from fastrl.verify.run import devices_here as devices_here
from fastrl.verify.run import header as header
from fastrl.verify.run import line as line
from fastrl.verify.run import record as record
from fastrl.verify.run import result as result
from fastrl.verify.run import succeeded as succeeded
from fastrl.verify.run import summary as summary
from fastrl.verify.run import verify as verify
