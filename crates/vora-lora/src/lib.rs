//! A linear layer that can carry low-rank adapters: attach, merge, unmerge.
