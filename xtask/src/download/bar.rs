//! How a download is shown: a bar on a terminal; elsewhere one line for a file that takes a while.

use indicatif::{ProgressBar, ProgressStyle};
use vora_hub::Progress;

use super::note;

/// The bar of the file that is fetched.
#[derive(Debug)]
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// Shows nothing before the first file.
    pub(crate) fn new() -> Self {
        Self(ProgressBar::hidden())
    }
}

impl Progress for Bar {
    fn begin(&mut self, file: &str, size: u64) {
        let bar = ProgressBar::new(size).with_message(file.to_owned());
        if bar.is_hidden() && size > 1 << 20 {
            note(&format!("fetching {file}, {} MB", size.div_ceil(1_000_000)));
        }
        let style = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}, {eta} left");
        self.0 = bar.with_style(style.expect("the template is right"));
    }

    fn advance(&mut self, len: u64) {
        self.0.set_position(len);
    }

    fn end(&mut self) {
        self.0.finish_and_clear();
    }
}
