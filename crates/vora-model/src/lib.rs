//! Vision as LoRA: splices patches among word embeddings, reads and writes checkpoint folders.
