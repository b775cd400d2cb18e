"""The vocabulary operations and token arithmetic: dispatch and autograd."""

from fastrl.backends.choice import explain as explain
from fastrl.ops.linear_token_logprobs import linear_token_logprobs as linear_token_logprobs
from fastrl.ops.rows import TokenLogprobs as TokenLogprobs
from fastrl.ops.token_logprobs import token_logprobs as token_logprobs
