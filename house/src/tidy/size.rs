//! How long files and crates may be.
//!
//! A line of code is one that holds more than blanks and comments, doc comments among them. What tests alone compile is
//! not counted in a file that holds other code too; a file of tests only (`tests.rs`, `tests/`) is counted as it is.
//! A crate's lines are all lines of its `src/`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::fault::{Fault, Rule};
use crate::test_code;
use crate::workspace::Workspace;

/// Lines of code in a file.
const FILE: usize = 700;
/// Lines in a crate.
const CRATE: usize = 8_000;

/// Counts every file of every package.
pub(super) fn check(root: &Path, workspace: &Workspace) -> Result<Vec<Fault>> {
    let mut faults = Vec::new();
    for package in workspace.members() {
        let folder = package.manifest_path.parent().context("a manifest lies in a folder")?;
        let shown = |path: &Path| path.strip_prefix(root).unwrap_or(path).display().to_string();
        let mut lines_of_crate = 0;
        for file in files(folder)? {
            let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let lines = lines_of_code(&text).with_context(|| format!("reading {}", file.display()))?;
            if lines > FILE {
                let what = format!("{lines} lines of code, at most {FILE}");
                faults.push(Fault { rule: Rule::Size, place: shown(&file), what });
            }
            if file.starts_with(folder.join("src")) {
                lines_of_crate += text.lines().count();
            }
        }
        if lines_of_crate > CRATE {
            let what = format!("{lines_of_crate} lines in src/, at most {CRATE}: move a room into a crate of its own");
            faults.push(Fault { rule: Rule::Size, place: shown(folder), what });
        }
    }
    Ok(faults)
}

/// The Rust files of a package, but not those of a package inside it.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') && !path.join("Cargo.toml").exists() {
                found.extend(files(&path)?);
            }
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn lines_of_code(text: &str) -> Result<usize, syn::Error> {
    let tokens: TokenStream = text.parse()?;
    let mut lines = BTreeSet::new();
    add_lines(tokens.clone(), &mut lines);
    let items = syn::parse2::<syn::File>(tokens)?.items;
    Ok(lines.difference(&test_code::lines(&items)).count())
}

fn add_lines(tokens: TokenStream, lines: &mut BTreeSet<usize>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        let doc = |at: usize| tokens.get(at).is_some_and(is_doc);
        match token {
            _ if is_doc(token) => {}
            // The `#` and `!` before it, which a doc comment is parsed to.
            TokenTree::Punct(punct) if punct.as_char() == '#' && (doc(at + 1) || doc(at + 2)) => {}
            TokenTree::Punct(punct) if punct.as_char() == '!' && doc(at + 1) => {}
            TokenTree::Group(group) => {
                lines.extend([group.span_open().start().line, group.span_close().end().line]);
                add_lines(group.stream(), lines);
            }
            _ => lines.extend(token.span().start().line..=token.span().end().line),
        }
    }
}

/// Whether it is the `[doc = ".."]` of a doc comment.
fn is_doc(token: &TokenTree) -> bool {
    let TokenTree::Group(group) = token else { return false };
    let mut inside = group.stream().into_iter();
    group.delimiter() == Delimiter::Bracket
        && matches!(inside.next(), Some(TokenTree::Ident(name)) if name == "doc")
        && matches!(inside.next(), Some(TokenTree::Punct(punct)) if punct.as_char() == '=')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(text: &str) -> usize {
        lines_of_code(text).unwrap()
    }

    #[test]
    fn comments_and_blank_lines_are_not_code() {
        assert_eq!(count("//! Doc.\n\n// comment\n/// Doc.\nfn a() { // said\n    /* long\n    comment */\n\n}\n"), 2);
        assert_eq!(count("#[derive(Debug)]\nstruct A {\n    /// Doc.\n    a: u8,\n}\n"), 4);
        assert_eq!(count("const A: &str = \"one\n// two\n\";\n"), 3);
    }

    #[test]
    fn tests_are_not_counted_beside_other_code() {
        assert_eq!(count("fn a() {}\n\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\n"), 1);
        assert_eq!(count("use super::*;\n#[test]\nfn b() {}\n"), 3); // a `tests.rs`
    }

    #[test]
    fn long_files_and_crates_are_faults() {
        let house = tempfile::tempdir().unwrap();
        let source = |path: &str, lines: usize, line: &str| {
            let path = house.path().join("crates/a").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, line.repeat(lines)).unwrap();
        };
        let mut workspace = Workspace::of(&["a"]);
        workspace.move_to(house.path());
        let found = || -> Vec<String> {
            let faults = check(house.path(), &workspace).unwrap();
            faults.into_iter().map(|fault| format!("{} {}", fault.place, fault.what)).collect()
        };
        source("src/lib.rs", FILE, "use a;\n");
        source("src/b.rs", CRATE - FILE, "// said\n");
        source("tests/it.rs", FILE, "use a;\n");
        assert_eq!(found(), [""; 0]);
        source("src/lib.rs", FILE + 1, "use a;\n");
        source("tests/it.rs", FILE + 1, "use a;\n");
        let found = found();
        assert_eq!(found[0], "crates/a/src/lib.rs 701 lines of code, at most 700");
        assert_eq!(found[1], "crates/a/tests/it.rs 701 lines of code, at most 700");
        assert!(found[2].starts_with("crates/a 8001 lines in src/"), "{}", found[2]);
    }
}
