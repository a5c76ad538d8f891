//! Small crates to test on.

use std::collections::BTreeSet;
use std::fs;

use super::sources::Sources;
use super::workspace::Target;

/// The modules of libraries whose files are `(CRATE/path, text)`, `CRATE/lib.rs` being the root.
pub fn sources(files: &[(&str, &str)]) -> Sources {
    let folder = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = folder.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let names: BTreeSet<&str> = files.iter().map(|(path, _)| path.split('/').next().unwrap()).collect();
    let target =
        |name: &str| Target { name: name.to_owned(), library: true, file: folder.path().join(name).join("lib.rs") };
    let targets: Vec<Target> = names.into_iter().map(target).collect();
    Sources::read(folder.path(), &targets).unwrap()
}
