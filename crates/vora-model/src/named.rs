//! Models that a folder names and does not hold, the LLM below an adapter for one: named so that they are found from any place.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::files::{FROM_HERE, Resolve, read_raw_config};

/// The keys of `config.json` that name such models.
const KEYS: [&str; 3] = ["llm", "mm_vision_tower", "aux_vision"];

/// A name as it stands, or the whole path of what lies there.
pub fn whole_path(name: &str) -> String {
    let path = Path::new(name).canonicalize().ok().filter(|_| !name.is_empty());
    path.map_or_else(|| name.to_owned(), |path| path.to_string_lossy().into_owned())
}

/// Writes whole paths into the config that `folder` will have, where it names folders, and beside them, under
/// `paths_from_here`, the ways there from `folder`: by these it finds what moves together with it.
pub fn name_paths(config: &mut Value, folder: &Path) {
    let Value::Object(config) = config else { return };
    let mut from_here = Map::new();
    for key in KEYS {
        let Some(Value::String(name)) = config.get_mut(key) else { continue };
        let whole = whole_path(name);
        if let (true, Ok(folder)) = (Path::new(&whole).is_absolute(), folder.canonicalize()) {
            from_here.insert(key.to_owned(), json!(way(&folder, Path::new(&whole))));
        }
        *name = whole;
    }
    if !from_here.is_empty() {
        config.insert(FROM_HERE.to_owned(), Value::Object(from_here));
    }
}

/// The way from one folder to another, both whole paths.
fn way(from: &Path, to: &Path) -> PathBuf {
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| Path::new(".."));
    up.chain(to.components().skip(common).map(|part| Path::new(part.as_os_str()))).collect()
}

/// The folder of the model that `key` in the `config.json` of `folder` names: as it is written, which is a name of the hub or a path, from
/// the current folder where that is relative; else from `folder`, by the same path and by the way that was written beside it.
///
/// # Errors
/// Where the key is missing, and where there is nothing in any of these places, which are named.
pub fn find(folder: &Path, key: &str, resolve: &Resolve<'_>) -> Result<PathBuf> {
    let config = read_raw_config(folder)?;
    let name = config.get(key).and_then(Value::as_str).filter(|name| !name.is_empty());
    let name = name.with_context(|| format!("config.json of {} has no `{key}`", folder.display()))?;
    let from_here = config.get(FROM_HERE).and_then(|paths| paths.get(key)?.as_str());
    let config = folder.join("config.json");
    locate(folder, name, from_here, resolve).with_context(|| format!("`{key}` of {}", config.display()))
}

/// The same of a name that stands elsewhere in `folder`.
pub(crate) fn locate(folder: &Path, name: &str, from_here: Option<&str>, resolve: &Resolve<'_>) -> Result<PathBuf> {
    let error = match resolve(name) {
        Ok(found) => return Ok(found),
        Err(error) if name.is_empty() => return Err(error),
        Err(error) => error,
    };
    let places = [Some(name), from_here].into_iter().flatten().map(|path| folder.join(path));
    let places: Vec<PathBuf> = places.filter(|place| place != Path::new(name)).collect();
    let found = places.iter().find(|place| resolve(&place.to_string_lossy()).is_ok());
    found.cloned().ok_or_else(|| {
        let tried: Vec<String> = places.iter().map(|place| format!(", nor is {}", place.display())).collect();
        let current = if Path::new(name).is_absolute() { "" } else { " from the current folder" };
        error.context(format!("`{name}` is not there{current}{}; write there where it lies", tried.concat()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::ensure;

    #[test]
    fn a_folder_finds_what_stayed_and_what_moved_with_it() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        let (llm, end) = (root.join("a/models/llm"), root.join("a/runs/x/final"));
        for folder in [&llm, &end] {
            std::fs::create_dir_all(folder).unwrap();
        }
        let resolve = |name: &str| {
            ensure!(Path::new(name).is_dir(), "`{name}` is no folder");
            Ok(PathBuf::from(name))
        };
        let odd = root.join("a/runs/../models/llm");
        let mut config = json!({"llm": odd.to_str().unwrap(), "aux_vision": "some/teacher", "mm_vision_tower": ""});
        name_paths(&mut config, &end);
        assert_eq!(config["llm"], llm.to_str().unwrap());
        assert_eq!((&config["aux_vision"], &config["mm_vision_tower"]), (&"some/teacher".into(), &"".into()));
        assert_eq!(config[FROM_HERE], json!({"llm": "../../../models/llm"}));
        let write = |config: &Value| std::fs::write(end.join("config.json"), config.to_string()).unwrap();
        write(&config);
        assert_eq!(find(&end, "llm", &resolve).unwrap(), llm);
        // The folder alone elsewhere, then both together.
        let alone = root.join("b");
        std::fs::create_dir(&alone).unwrap();
        std::fs::copy(end.join("config.json"), alone.join("config.json")).unwrap();
        assert_eq!(find(&alone, "llm", &resolve).unwrap(), llm);
        std::fs::rename(root.join("a"), root.join("c")).unwrap();
        let moved = find(&root.join("c/runs/x/final"), "llm", &resolve).unwrap();
        assert_eq!(moved.canonicalize().unwrap(), root.join("c/models/llm"));
        // Where nothing is, all places are named.
        let error = format!("{:#}", find(&alone, "llm", &resolve).unwrap_err());
        let tried = format!("`{}` is not there, nor is {}/../../../models/llm", llm.display(), alone.display());
        assert!(error.contains(&tried) && error.contains("`llm` of"), "{error}");
        let error = format!("{:#}", find(&alone, "mm_vision_tower", &resolve).unwrap_err());
        assert!(error.ends_with("has no `mm_vision_tower`"), "{error}");
        // As others write it, from the folder itself.
        std::fs::create_dir(alone.join("below")).unwrap();
        assert_eq!(locate(&alone, "below", None, &resolve).unwrap(), alone.join("below"));
        let error = format!("{:#}", locate(&alone, "no/where", None, &resolve).unwrap_err());
        assert!(error.contains("`no/where` is not there from the current folder, nor is"), "{error}");
    }
}
