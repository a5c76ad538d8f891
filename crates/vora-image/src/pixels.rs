//! What a processor makes of a picture.

/// A picture as a model takes it, in plain memory: worker threads make it without touching tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// `[3, height, width]`, row by row.
    pub data: Vec<f32>,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}
