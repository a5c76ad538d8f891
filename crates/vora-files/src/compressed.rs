//! Files that somebody compressed, known by what they begin with.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// What compressed files begin with, how that is called, and what undoes it.
const KINDS: [(&[u8], &str, &str); 12] = [
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"\x1f\x9d", "compress", "uncompress"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"\x5d\0\0", "lzma", "unlzma"),
    (b"LZIP", "lzip", "lzip -d"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unzstd"),
    (b"\x04\x22\x4d\x18", "LZ4", "unlz4"),
    (b"PK\x03\x04", "zip", "unzip"),
    (b"PK\x05\x06", "zip", "unzip"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", "7z x"),
    (b"Rar!\x1a\x07", "RAR", "unrar x"),
];

/// An error where `start`, the first bytes of the file at `path`, is that of a compressed file, which `instead`, said of what is
/// read in its place, tells what to do about.
///
/// # Errors
/// Names the file, the compression and the command that undoes it.
pub fn refuse_compressed(path: &Path, start: &[u8], instead: &str) -> Result<()> {
    let Some((_, name, command)) = KINDS.iter().find(|(magic, ..)| start.starts_with(magic)) else { return Ok(()) };
    let shown = path.display();
    bail!("{shown} is compressed ({name}), and {instead}: decompress it first, `{command} {shown}`")
}

/// The text in a file.
///
/// # Errors
/// Where the file cannot be read, is compressed, or is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let cannot = || format!("cannot read {}", path.display());
    let bytes = fs::read(path).with_context(cannot)?;
    refuse_compressed(path, &bytes, "text is read as it is")?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow::anyhow!("{}: it is not UTF-8 from byte {at} on", cannot())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_text_is_named_with_what_undoes_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let said = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            read_text(&path).map_err(|error| format!("{error:#}"))
        };
        for (magic, name, command) in KINDS {
            let error = said(&[magic, b"more"].concat()).unwrap_err();
            assert!(error.contains(&format!("a.txt is compressed ({name}), and text is read as it is")), "{error}");
            assert!(error.ends_with(&format!("`{command} {}`", path.display())), "{error}");
        }
        assert_eq!(said(b"BZ, a text").unwrap(), "BZ, a text");
        assert!(said(b"ab\xff").unwrap_err().ends_with("it is not UTF-8 from byte 2 on"));
        assert!(format!("{:#}", read_text(&folder.path().join("none")).unwrap_err()).contains("cannot read"));
    }
}
