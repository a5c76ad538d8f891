//! The checksums of a folder's files, as `sha256sum` writes and checks them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::error::FilesError;
use crate::write::write_bytes;

/// The file that they stand in.
pub const MANIFEST: &str = "SHA256SUMS";

/// Writes those of every file in `folder`.
///
/// # Errors
/// Where a file cannot be read or the list not written.
pub fn write(folder: &Path) -> Result<()> {
    let mut digests = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        digests.insert(name, digest_of(&path)?);
    }
    write_list(folder, &digests)
}

/// Writes those that whoever wrote the files found, by name: [`digest_of`].
///
/// # Errors
/// Where the list cannot be written.
pub fn write_list(folder: &Path, digests: &BTreeMap<String, String>) -> Result<()> {
    let lines = digests.iter().map(|(name, digest)| format!("{digest}  {name}\n"));
    write_bytes(&folder.join(MANIFEST), lines.collect::<String>().as_bytes())
}

/// Compares every file that a folder's checksums name, and returns their names; a folder without checksums has none.
///
/// # Errors
/// [`FilesError::Checksum`] of the first file that differs, [`FilesError::Manifest`] where the list is not whole; where a
/// file is missing or cannot be read, what the disk says.
pub fn verify(folder: &Path) -> Result<Vec<String>> {
    let manifest = folder.join(MANIFEST);
    if !manifest.is_file() {
        return Ok(Vec::new());
    }
    let text = fs::read(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let text = String::from_utf8_lossy(&text);
    let damaged = |fault: String| FilesError::Manifest { path: manifest.clone(), fault };
    let mut listed = Vec::new();
    for line in text.lines() {
        let (expected, name) =
            line.split_once("  ").ok_or_else(|| damaged(format!("has a line that is no checksum: `{line}`")))?;
        ensure!(!name.contains(['/', '\\']), damaged(format!("names a file outside: `{name}`")));
        let path = folder.join(name);
        let found = digest_of(&path)?;
        ensure!(
            found == expected,
            FilesError::Checksum { path, found, expected: expected.to_owned(), manifest: MANIFEST }
        );
        listed.push(name.to_owned());
    }
    ensure!(text.ends_with('\n'), damaged("is not a whole list of a checkpoint's files".to_owned()));
    Ok(listed)
}

/// SHA-256 of bytes that are at hand, in hex.
pub fn of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of a file, in hex.
///
/// # Errors
/// Where it cannot be read.
pub fn digest_of(path: &Path) -> Result<String> {
    let mut digest = Sha256::new();
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    std::io::copy(&mut file, &mut digest).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(hex(&digest.finalize()))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_a_damaged_list_and_a_missing_file_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let (a, manifest) = (folder.path().join("a"), folder.path().join(MANIFEST));
        fs::write(&a, "one").unwrap();
        write(folder.path()).unwrap();
        assert_eq!(verify(folder.path()).unwrap(), ["a"]);
        let fault = || verify(folder.path()).unwrap_err();

        fs::write(&a, "two").unwrap();
        let (found, expected) = (of(b"two"), of(b"one"));
        assert_eq!(
            fault().downcast_ref(),
            Some(&FilesError::Checksum { path: a.clone(), found, expected, manifest: MANIFEST })
        );

        let damaged = |fault: &str| FilesError::Manifest { path: manifest.clone(), fault: fault.to_owned() };
        for (list, says) in [
            (format!("{}  a", of(b"two")), "is not a whole list of a checkpoint's files"),
            ("0123\n".to_owned(), "has a line that is no checksum: `0123`"),
            ("0123  ../a\n".to_owned(), "names a file outside: `../a`"),
        ] {
            fs::write(&manifest, list).unwrap();
            assert_eq!(fault().downcast_ref(), Some(&damaged(says)));
        }

        fs::write(&manifest, format!("{}  b\n", of(b"two"))).unwrap();
        let missing = fault();
        assert!(missing.downcast_ref::<FilesError>().is_none(), "{missing:#}");
        assert_eq!(missing.downcast_ref::<std::io::Error>().unwrap().kind(), std::io::ErrorKind::NotFound);
    }
}
