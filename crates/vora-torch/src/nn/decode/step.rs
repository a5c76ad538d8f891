//! `Step`: where one token a row stands.

use std::collections::HashSet;

use anyhow::{Result, ensure};

use super::pages::Pages;

/// One new token for each of some rows.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// The pages of each row, `[rows, max_pages]`; what lies beyond a row's tokens may be anything.
    pub tables: &'a [i32],
    /// Tokens that each row holds, the new one not counted, `[rows]`.
    pub lens: &'a [i64],
    /// Cos of the angles of each row's position, `[rows, head_dim / 2]`.
    pub cos: &'a [f32],
    /// Sin of the same.
    pub sin: &'a [f32],
    /// Whether adapters act on each row, `[rows]`.
    pub adapted: &'a [bool],
}

impl Step<'_> {
    /// Rows.
    pub fn rows(&self) -> usize {
        self.lens.len()
    }

    /// Checks that every place that the step reads or writes is there, and that no two rows write to the same one.
    pub(super) fn check(&self, pages: &Pages, head_dim: i64) -> Result<()> {
        let rows = self.rows();
        ensure!(rows > 0, "a decoding step without rows");
        ensure!(
            self.adapted.len() == rows && self.tables.len() % rows == 0,
            "a step of {rows} rows with {} pages in tables and {} answers whether adapters act",
            self.tables.len(),
            self.adapted.len()
        );
        let angles = rows * head_dim as usize / 2;
        ensure!(
            self.cos.len() == angles && self.sin.len() == angles,
            "a step of {rows} rows has {} cosines and {} sines, {angles} were expected",
            self.cos.len(),
            self.sin.len()
        );
        let (max_pages, page_len) = (self.tables.len() / rows, pages.page_len());
        let mut written = HashSet::with_capacity(rows);
        for (row, &len) in self.lens.iter().enumerate() {
            ensure!(
                len >= 0 && len / page_len < max_pages as i64,
                "row {row} has {len} tokens in {max_pages} pages of {page_len}"
            );
            let last = (len / page_len) as usize;
            let table = &self.tables[row * max_pages..row * max_pages + last + 1];
            if let Some(page) = table.iter().find(|&&page| i64::from(page) >= pages.num_pages() || page < 0) {
                anyhow::bail!("row {row} has page {page} of {}", pages.num_pages());
            }
            ensure!(
                written.insert((table[last], len % page_len)),
                "row {row} writes to slot {} of page {}, as a row before it does",
                len % page_len,
                table[last]
            );
        }
        Ok(())
    }
}
