//! Records to samples to batches: conversations, procedural scenes, worker threads.
