//! What every crate here asks of files: written whole or not at all, with checksums where they must last, JSON objects
//! whose faults name their key, and notes that a user is told once. It knows no format but these, and links no libtorch.
//!
//! ```
//! # fn main() -> anyhow::Result<()> {
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("a.json");
//! vora_files::write_bytes(&path, b"{}")?; // a crash leaves the old file or the new one
//! vora_files::checksums::write(folder.path())?;
//! assert_eq!(vora_files::checksums::verify(folder.path())?, ["a.json"]);
//! # Ok(())
//! # }
//! ```

pub mod checksums;
mod compressed;
mod error;
mod notes;
mod object;
mod write;

pub use compressed::{read_text, refuse_compressed};
pub use error::FilesError;
pub use notes::tell_once;
pub use object::object;
pub use write::{ensure_vacant, write_atomically, write_bytes, write_folder_atomically};
