//! `Step`: where some new tokens stand.

use std::collections::HashSet;

use anyhow::{Result, bail, ensure};

use super::pages::Pages;
use crate::packed::LoraId;

/// New tokens, one a row. Several rows may be tokens of one text, which then have the same pages: a prompt, or a part of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Step<'a> {
    /// The pages of each row, `[rows, max_pages]`; what lies beyond a row's tokens may be anything.
    pub tables: &'a [i32],
    /// Tokens before the new one, `[rows]`: it is written to the slot behind them.
    pub lens: &'a [i64],
    /// How many tokens of its text each row attends to, `[rows]`, all of which are held or written in this step: the end of a
    /// picture whose tokens attend to each other. Where this is empty, those before it and itself.
    pub ends: &'a [i64],
    /// Cos of the angles of each row's position, `[rows, head_dim / 2]`.
    pub cos: &'a [f32],
    /// Sin of the same.
    pub sin: &'a [f32],
    /// The adapter of each row, `[rows]`: fastest where rows of one lie side by side.
    pub adapters: &'a [LoraId],
    /// The rows whose logits are asked for; all where this is empty.
    pub asked: &'a [i64],
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
            self.adapters.len() == rows && self.tables.len().is_multiple_of(rows),
            "a step of {rows} rows with {} pages in tables and adapters of {} rows",
            self.tables.len(),
            self.adapters.len()
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
        ensure!(
            self.ends.is_empty() || self.ends.len() == rows,
            "a step of {rows} rows with {} ends of what they attend to",
            self.ends.len()
        );
        if let Some(row) = self.asked.iter().find(|&&row| row < 0 || row >= rows as i64) {
            bail!("logits of row {row} of {rows}");
        }
        for (row, &len) in self.lens.iter().enumerate() {
            let end = self.ends.get(row).map_or(len + 1, |&end| end);
            ensure!(0 <= len && len < end, "row {row} has {len} tokens before it, and attends to {end}");
            ensure!(
                (end - 1) / page_len < max_pages as i64,
                "row {row} has {end} tokens in {max_pages} pages of {page_len}"
            );
            let table = &self.tables[row * max_pages..row * max_pages + ((end - 1) / page_len) as usize + 1];
            if let Some(page) = table.iter().find(|&&page| i64::from(page) >= pages.num_pages() || page < 0) {
                bail!("row {row} has page {page} of {}", pages.num_pages());
            }
            let place = (table[(len / page_len) as usize], len % page_len);
            ensure!(
                written.insert(place),
                "row {row} writes to slot {} of page {}, as a row before it does",
                place.1,
                place.0
            );
        }
        Ok(())
    }
}
