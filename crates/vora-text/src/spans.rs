//! Which tokens of a row are text and which are an image, and what they belong to.

use anyhow::{Result, bail, ensure};

/// What the tokens of a span are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modality {
    /// Word pieces.
    Text,
    /// Patches of one image, row by row.
    Image {
        /// Patches from top to bottom.
        rows: i64,
        /// Patches from left to right.
        cols: i64,
    },
}

/// A run of tokens of one modality.
///
/// A token attends to the earlier tokens of its own document that lie on the trunk (`branch` none) or on its own
/// branch: several questions can share one image prefix in a single row without attending to each other. Text that all
/// documents of a row begin with (`document` none) stands at its start, once for all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    modality: Modality,
    len: i64, // an image has rows * cols
    document: Option<i64>,
    branch: Option<i64>,
}

impl Span {
    /// Text on the trunk of document 0.
    pub fn text(len: i64) -> Self {
        Self { modality: Modality::Text, len, document: Some(0), branch: None }
    }

    /// An image on the trunk of document 0.
    pub fn image(rows: i64, cols: i64) -> Self {
        Self { modality: Modality::Image { rows, cols }, len: rows * cols, document: Some(0), branch: None }
    }

    /// The same span in another document of the row.
    #[must_use]
    pub fn in_document(self, document: i64) -> Self {
        Self { document: Some(document), ..self }
    }

    /// The same text as the beginning of every document of the row.
    #[must_use]
    pub fn in_all_documents(self) -> Self {
        Self { document: None, ..self }
    }

    /// The same span on a branch of its document.
    #[must_use]
    pub fn on_branch(self, branch: i64) -> Self {
        Self { branch: Some(branch), ..self }
    }

    /// Text of another length in the same place.
    ///
    /// # Panics
    /// Where the span is an image, whose length is that of its grid.
    #[must_use]
    pub fn with_len(self, len: i64) -> Self {
        assert!(!self.is_image(), "an image is as long as its grid");
        Self { len, ..self }
    }

    /// What its tokens are.
    pub fn modality(&self) -> Modality {
        self.modality
    }

    /// Tokens in it.
    pub fn len(&self) -> i64 {
        self.len
    }

    /// Whether it has no tokens; [`Spans::validate`] refuses such a span.
    pub fn is_empty(&self) -> bool {
        self.len <= 0
    }

    /// Which of the documents packed into the row it belongs to; none for the text that all of them begin with. Positions
    /// of each start at 0, or go on from that text's end.
    pub fn document(&self) -> Option<i64> {
        self.document
    }

    /// Which branch of the document it lies on, none for the trunk. All branches come after the trunk, and positions on
    /// each go on from the trunk's end.
    pub fn branch(&self) -> Option<i64> {
        self.branch
    }

    /// Whether its tokens are an image's.
    pub fn is_image(&self) -> bool {
        matches!(self.modality, Modality::Image { .. })
    }
}

/// The spans of every row of a batch, in order; rows shorter than the longest are padded at their end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans {
    rows: Vec<Vec<Span>>,
}

impl Spans {
    /// A batch of these rows, one list of spans each.
    pub fn new(rows: Vec<Vec<Span>>) -> Self {
        Self { rows }
    }

    /// Rows of nothing but text, of these lengths.
    pub fn text(lens: &[i64]) -> Self {
        Self { rows: lens.iter().map(|&len| vec![Span::text(len)]).collect() }
    }

    /// Texts as rows of nothing but text: their ids, `[batch, seq]` row after row, shorter ones padded with 0 at their end,
    /// and their spans.
    pub fn padded(texts: &[impl AsRef<[i64]>]) -> (Vec<i64>, Self) {
        let spans = Self::text(&texts.iter().map(|text| text.as_ref().len() as i64).collect::<Vec<_>>());
        let mut input_ids = Vec::with_capacity(texts.len() * spans.seq() as usize);
        for (text, end) in texts.iter().zip((1..).map(|row| row * spans.seq() as usize)) {
            input_ids.extend_from_slice(text.as_ref());
            input_ids.resize(end, 0);
        }
        (input_ids, spans)
    }

    /// The spans of each row, in order.
    pub fn rows(&self) -> &[Vec<Span>] {
        &self.rows
    }

    /// The rows themselves.
    pub fn into_rows(self) -> Vec<Vec<Span>> {
        self.rows
    }

    /// Rows in the batch.
    pub fn batch(&self) -> i64 {
        self.rows.len() as i64
    }

    /// Tokens of the longest row, padding of the others included.
    pub fn seq(&self) -> i64 {
        self.row_lens().max().unwrap_or(0)
    }

    /// Tokens in all rows, padding not counted.
    pub fn num_tokens(&self) -> i64 {
        self.row_lens().sum()
    }

    /// Tokens of each row, padding not counted.
    pub fn row_lens(&self) -> impl Iterator<Item = i64> {
        self.rows.iter().map(|row| row.iter().map(|span| span.len).sum())
    }

    /// Places of all image tokens in the batch flattened to `[batch * seq]`, in its order.
    pub fn image_positions(&self) -> Vec<i64> {
        let seq = self.seq();
        let mut positions = Vec::new();
        for (row_idx, row) in self.rows.iter().enumerate() {
            let mut start = row_idx as i64 * seq;
            for span in row {
                if span.is_image() {
                    positions.extend(start..start + span.len);
                }
                start += span.len;
            }
        }
        positions
    }

    /// Checks lengths, grids and the order of trunk and branches.
    ///
    /// # Errors
    /// Names row and span.
    pub fn validate(&self) -> Result<()> {
        ensure!(!self.rows.is_empty(), "a batch of no rows");
        ensure!(self.seq() > 0, "a batch of no tokens");
        for (row_idx, row) in self.rows.iter().enumerate() {
            let mut branched = Vec::new();
            for (span_idx, span) in row.iter().enumerate() {
                let place = || format!("row {row_idx}, span {span_idx}");
                ensure!(span.len > 0, "{}: length is {}, it must be at least 1", place(), span.len);
                match span.document {
                    Some(document) => {
                        ensure!(document >= 0, "{}: document is {document}, it must not be negative", place())
                    }
                    None => ensure!(
                        !span.is_image()
                            && span.branch.is_none()
                            && row[..span_idx].iter().all(|s| s.document.is_none()),
                        "{}: what all documents begin with is text without a branch, at the start of the row",
                        place()
                    ),
                }
                if let Modality::Image { rows, cols } = span.modality {
                    ensure!(
                        rows > 0 && cols > 0 && rows.checked_mul(cols) == Some(span.len),
                        "{}: length is {}, its image has {rows} rows of {cols}",
                        place(),
                        span.len
                    );
                }
                match span.branch {
                    Some(branch) if branch < 0 => bail!("{}: branch is {branch}, it must not be negative", place()),
                    Some(_) => branched.push(span.document),
                    None => ensure!(
                        !branched.contains(&span.document),
                        "{}: trunk of document {} after one of its branches",
                        place(),
                        span.document.unwrap_or_default()
                    ),
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_places() {
        let spans = Spans::new(vec![vec![Span::text(1), Span::image(1, 2)], vec![Span::image(1, 1), Span::text(4)]]);
        assert_eq!((spans.batch(), spans.seq(), spans.num_tokens()), (2, 5, 8));
        assert_eq!(spans.image_positions(), [1, 2, 5]);
    }

    #[test]
    fn shorter_texts_are_padded_at_their_end() {
        let (input_ids, spans) = Spans::padded(&[vec![5, 6], vec![7, 8, 9, 10], vec![11]]);
        assert_eq!(input_ids, [5, 6, 0, 0, 7, 8, 9, 10, 11, 0, 0, 0]);
        assert_eq!(spans, Spans::text(&[2, 4, 1]));
        assert_eq!(Spans::padded(&[[0i64; 0]; 0]), (vec![], Spans::default()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = Span { len: 5, ..Span::image(2, 3) };
        for (rows, says) in [
            (vec![], "a batch of no rows"),
            (vec![vec![]], "a batch of no tokens"),
            (vec![vec![Span::text(1), Span::text(0)]], "row 0, span 1: length is 0"),
            (vec![vec![Span::text(-3)], vec![Span::text(4)]], "row 0, span 0: length is -3"),
            (vec![vec![wrong]], "row 0, span 0: length is 5, its image has 2 rows of 3"),
            (vec![vec![Span::text(1).in_document(-1)]], "document is -1"),
            (vec![vec![Span::text(1).on_branch(-1)]], "branch is -1"),
            (
                vec![vec![Span::text(1), Span::text(1).in_all_documents()]],
                "row 0, span 1: what all documents begin with",
            ),
            (vec![vec![Span::image(1, 1).in_all_documents()]], "what all documents begin with is text"),
            (vec![vec![Span::text(1).in_all_documents().on_branch(0)]], "what all documents begin with is text"),
            (vec![vec![Span::text(1), Span::text(1).on_branch(0), Span::text(1)]], "trunk of document 0 after"),
        ] {
            let error = Spans::new(rows).validate().unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
