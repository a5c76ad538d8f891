//! How a caller follows a download.

/// Is told of each file that is fetched, one after another. A file that breaks off has no end.
pub trait Progress {
    /// `file`, of `size` bytes, is going to be fetched.
    fn begin(&mut self, file: &str, size: u64);
    /// So many of its bytes are there, those of an earlier try among them; fewer than before where it begins anew.
    fn advance(&mut self, len: u64);
    /// All of its bytes came; whether they are the right ones is checked next.
    fn end(&mut self);
}

/// Nobody watches.
impl Progress for () {
    fn begin(&mut self, _file: &str, _size: u64) {}
    fn advance(&mut self, _len: u64) {}
    fn end(&mut self) {}
}
