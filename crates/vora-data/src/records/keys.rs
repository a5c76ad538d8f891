//! What a record's own keys are called.

/// What a record's own keys are called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordKeys {
    /// Its image files.
    pub frames: String,
    /// Its turns.
    pub conversations: String,
}

impl Default for RecordKeys {
    fn default() -> Self {
        Self { frames: "frames".to_owned(), conversations: "conversations".to_owned() }
    }
}
