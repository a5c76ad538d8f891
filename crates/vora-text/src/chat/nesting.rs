//! How deep a template's expressions and statements go: our engine walks them by recursion, and has no limit of its own for
//! chains of operators, attributes, filters and `elif`.

use anyhow::{Result, ensure};

/// No expression is deeper, and no `if` has more branches; the templates in use have some tens.
pub(super) const MAX_NESTING: usize = 400;

/// The depth of one expression, as its tokens are read.
pub(super) struct Nesting {
    /// For each bracket that is open where it began, and where the element that is being read has got to.
    levels: Vec<[usize; 2]>,
}

impl Nesting {
    pub(super) fn new() -> Self {
        Self { levels: vec![[0, 0]] }
    }

    /// A bracket.
    pub(super) fn open(&mut self) -> Result<()> {
        self.deeper()?;
        let depth = self.now();
        self.levels.push([depth, depth]);
        Ok(())
    }

    pub(super) fn close(&mut self) {
        if self.levels.len() > 1 {
            self.levels.pop();
        }
    }

    /// An operator, a filter, an attribute: what it is applied to lies below it.
    pub(super) fn deeper(&mut self) -> Result<()> {
        let depth = self.now() + 1;
        ensure!(depth <= MAX_NESTING, "an expression of more than {MAX_NESTING} operations and brackets in each other");
        if let Some(level) = self.levels.last_mut() {
            level[1] = depth;
        }
        Ok(())
    }

    /// A comma: the next element begins.
    pub(super) fn next(&mut self) {
        if let Some(level) = self.levels.last_mut() {
            level[1] = level[0];
        }
    }

    fn now(&self) -> usize {
        self.levels.last().map_or(0, |level| level[1])
    }
}
