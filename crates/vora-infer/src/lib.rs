//! Generation: prefill, cached decoding, sampling, streaming.
