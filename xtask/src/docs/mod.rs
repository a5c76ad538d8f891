//! `cargo xtask docs`: the pages under `docs/` that are written from the sources.

mod declared;
mod default;
mod page;
mod schema;
mod serde;
mod shape;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cmd;
use house::sources::Sources;
use house::workspace::Workspace;

const RUN_FILE: &str = "docs/run-file.md";
/// The type that a run file is read into.
const ROOT: (&str, &str) = ("vora_recipe", "TrainConfig");

/// Writes `docs/run-file.md`.
pub fn run() -> Result<()> {
    let root = cmd::root();
    fs::write(root.join(RUN_FILE), run_file(&root)?).with_context(|| format!("cannot write {RUN_FILE}"))?;
    println!("{RUN_FILE}");
    Ok(())
}

fn run_file(root: &Path) -> Result<String> {
    let sources = Sources::read(root, &Workspace::read(root)?.targets())?;
    page::write(&schema::read(&sources, ROOT)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_the_run_file_is_what_the_sources_say() {
        let root = cmd::root();
        let page = fs::read_to_string(root.join(RUN_FILE)).unwrap_or_default();
        let is_same = page == run_file(&root).unwrap();
        assert!(is_same, "{RUN_FILE} is not what the sources say: run `cargo xtask docs`");
    }

    /// The files of the clone that `page` links to.
    fn links(page: &str) -> Vec<&str> {
        let targets = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        let files = targets.map(|target| target.split('#').next().unwrap_or_default());
        files.filter(|file| !file.is_empty() && !file.contains("://")).collect()
    }

    #[test]
    fn links_of_the_pages_lead_to_files() {
        assert_eq!(links("[a](b/c.md#d) ![](e.png), [f](https://g.h), [i](#j)"), ["b/c.md", "e.png"]);
        let root = cmd::root();
        let docs = fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
        let pages = ["README.md", "CONTRIBUTING.md"].map(|page| root.join(page)).into_iter().chain(docs);
        for page in pages.filter(|page| page.extension().is_some_and(|extension| extension == "md")) {
            let folder = page.parent().unwrap();
            for file in links(&fs::read_to_string(&page).unwrap()) {
                assert!(folder.join(file).exists(), "{} links to {file}, which is not there", page.display());
            }
        }
    }
}
