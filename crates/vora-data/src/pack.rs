//! How samples are put into the rows of a batch: one each, or as many as fit.

use crate::batch::{Batch, collate_rows};
use crate::sample::Sample;

/// The rows of a batch that is being filled.
///
/// Where samples are packed, each goes into the first row that has room for it, so what a batch holds depends on the
/// samples and their order alone. A sample that fits nowhere closes the batch and begins the next one.
#[derive(Debug)]
pub(crate) struct OpenBatch {
    num_rows: usize,
    row_len: Option<usize>, // tokens that samples packed into one row may have; none: a row takes one sample
    rows: Vec<Vec<(u64, Sample)>>, // each sample with its place in the walk
}

impl OpenBatch {
    /// A batch of up to `num_rows` rows; with a `row_len`, samples are packed into rows of so many tokens.
    pub(crate) fn new(num_rows: usize, row_len: Option<usize>) -> Self {
        Self { num_rows, row_len, rows: Vec::new() }
    }

    /// Puts a sample in, and gives the rows of a batch that this makes complete.
    pub(crate) fn push(&mut self, place: u64, sample: Sample) -> Option<Vec<Vec<Sample>>> {
        let Some(row_len) = self.row_len else {
            self.rows.push(vec![(place, sample)]);
            return (self.rows.len() == self.num_rows).then(|| self.take());
        };
        let len = |row: &Vec<(u64, Sample)>| row.iter().map(|(_, sample)| sample.input_ids.len()).sum::<usize>();
        if let Some(row) = self.rows.iter_mut().find(|row| len(row) + sample.input_ids.len() <= row_len) {
            row.push((place, sample));
            return None;
        }
        let complete = (self.rows.len() == self.num_rows).then(|| self.take());
        self.rows.push(vec![(place, sample)]);
        complete
    }

    /// The rows so far; the next batch begins.
    pub(crate) fn take(&mut self) -> Vec<Vec<Sample>> {
        let rows = std::mem::take(&mut self.rows);
        rows.into_iter().map(|row| row.into_iter().map(|(_, sample)| sample).collect()).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The places in the walk of the samples that it holds.
    pub(crate) fn places(&self) -> impl Iterator<Item = u64> {
        self.rows.iter().flatten().map(|(place, _)| *place)
    }
}

/// Packs samples that are all there already, as a [`Loader`](crate::Loader) packs a stream of them: into batches of
/// `num_rows` rows of up to `row_len` tokens, padded with `pad_id`.
pub fn pack(samples: Vec<Sample>, num_rows: usize, row_len: usize, pad_id: i64) -> Vec<Batch> {
    let mut open = OpenBatch::new(num_rows, Some(row_len));
    let mut batches: Vec<_> = samples.into_iter().filter_map(|sample| open.push(0, sample)).collect();
    if !open.is_empty() {
        batches.push(open.take());
    }
    batches.into_iter().map(|rows| collate_rows(rows, pad_id)).collect()
}

#[cfg(test)]
mod tests {
    use vora_text::Span;

    use super::*;

    fn sample(len: usize) -> Sample {
        Sample {
            id: len.to_string(),
            input_ids: vec![1; len],
            targets: vec![2; len],
            spans: vec![Span::text(len as i64)],
            images: Vec::new(),
            questions: Vec::new(),
            cut_answers: 0,
            notes: Vec::new(),
        }
    }

    /// The lengths of what stands in each row of each batch.
    fn packed(lens: &[usize], num_rows: usize, row_len: usize) -> Vec<Vec<Vec<usize>>> {
        let batches = pack(lens.iter().map(|&len| sample(len)).collect(), num_rows, row_len, 0);
        let rows = |batch: Batch| {
            let mut rows = vec![Vec::new(); batch.batch as usize];
            batch.samples.iter().for_each(|sample| rows[sample.row].push(sample.tokens.len()));
            rows
        };
        batches.into_iter().map(rows).collect()
    }

    #[test]
    fn each_goes_into_the_first_row_with_room() {
        assert_eq!(packed(&[6, 5, 4, 5, 1, 3], 2, 10), [vec![vec![6, 4], vec![5, 5]], vec![vec![1, 3]]]);
        assert_eq!(packed(&[6, 5, 4, 3, 10], 2, 10), [vec![vec![6, 4], vec![5, 3]], vec![vec![10]]]);
        assert_eq!(packed(&[3, 3], 1, 3), [vec![vec![3]], vec![vec![3]]]);
        assert!(packed(&[], 2, 10).is_empty());
        // One that is longer than the rows are to be has a row of its own.
        assert_eq!(packed(&[12, 4], 2, 10), [vec![vec![12], vec![4]]]);
    }
}
