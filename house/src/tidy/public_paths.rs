//! One path to each public item.
//!
//! From the root of every library its public modules and re-exports are walked. What two paths reach is a fault, in one crate
//! or in two, but for what crates hand on; of what other workspaces define, only the workspace's own re-exports are paths.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::fault::{Fault, Rule};
use crate::resolve::Named;
use crate::sources::{Import, ModuleId, Sources};

/// What crates hand on of those below them, so that who takes one of them need not name another. Within the crate that
/// defines it, it has one path like everything.
const HANDED_ON: [&str; 7] = ["tch", "optim", "Weights", "Width", "RgbImage", "Tokenizer", "Message"];

/// A public name in a module.
struct Export {
    name: String,
    named: Named,
    /// `file:line` of the item, or of the `pub use`.
    place: String,
    reexport: bool,
}

/// Each item, and the public paths to it with the place that makes each.
type Paths = BTreeMap<Named, Vec<(String, Export)>>;

pub(super) fn check(sources: &Sources) -> Vec<Fault> {
    let mut paths = Paths::new();
    let mut entered = BTreeSet::new();
    let roots = sources.roots.iter().filter(|root| root.library).map(|root| root.module);
    let mut waiting: VecDeque<(ModuleId, String)> = roots.map(|root| (root, sources.path_of(root))).collect();
    entered.extend(waiting.iter().map(|(root, _)| *root));
    // Breadth first: a module is entered by its shortest path, by others it is one fault and not one per item.
    while let Some((module, before)) = waiting.pop_front() {
        let all = exports(sources, module, &mut Vec::new()).into_iter();
        for export in all.filter(|export| !is_handed_on(sources, module, export)) {
            let path = format!("{before}::{}", export.name);
            if let Named::Module(inner) = export.named
                && entered.insert(inner)
            {
                waiting.push_back((inner, path.clone()));
            }
            let known = paths.entry(export.named.clone()).or_default();
            if !known.iter().any(|(other, _)| *other == path) {
                known.push((path, export));
            }
        }
    }
    faults(sources, &paths)
}

fn faults(sources: &Sources, paths: &Paths) -> Vec<Fault> {
    let mut faults = Vec::new();
    for (named, known) in paths {
        let is_root = matches!(named, Named::Module(module) if sources.modules[*module].parent.is_none());
        if known.len() + usize::from(is_root) < 2 {
            continue;
        }
        let all: Vec<String> = known.iter().map(|(path, _)| format!("`{path}`")).collect();
        let reexport = known.iter().map(|(_, export)| export).find(|export| export.reexport);
        let Some(place) = reexport.or(known.last().map(|(_, export)| export)).map(|export| export.place.clone()) else {
            continue;
        };
        let what = match is_root {
            true => format!("the crate `{}` is also {}", sources.full_path(named), all.join(", ")),
            false => all.join(", "),
        };
        faults.push(Fault { rule: Rule::PublicPaths, place, what });
    }
    faults
}

/// The public names of a module; `around` are the modules whose globs led here.
fn exports(sources: &Sources, module: ModuleId, around: &mut Vec<ModuleId>) -> Vec<Export> {
    if around.contains(&module) {
        return Vec::new();
    }
    around.push(module);
    let here = &sources.modules[module];
    let mut found = Vec::new();
    for id in &here.items {
        let item = &sources.items[*id];
        let place = sources.place(item.module, item.line);
        found.push(Export { name: item.name.clone(), named: Named::Item(*id), place, reexport: false });
    }
    for id in &here.children {
        let child = &sources.modules[*id];
        let (name, place) = (child.name.clone(), child.place.clone());
        found.push(Export { name, named: Named::Module(*id), place, reexport: false });
    }
    found.retain(|export| is_public(sources, &export.named));
    let public = || here.imports.iter().filter(|import| import.scope.is_none());
    for import in public() {
        if let Some(name) = &import.name {
            found.extend(targets(sources, module, import).map(|(named, place)| Export {
                name: name.clone(),
                named,
                place,
                reexport: true,
            }));
        }
    }
    for import in public().filter(|import| import.name.is_none()) {
        for (named, place) in targets(sources, module, import) {
            let Named::Module(inner) = named else { continue };
            for export in exports(sources, inner, around) {
                // A name that stands here outranks one that a glob brings.
                if !found.iter().any(|known| known.name == export.name) {
                    found.push(Export { place: place.clone(), reexport: true, ..export });
                }
            }
        }
    }
    around.pop();
    found
}

/// What a `pub use` of `module` names, and its place. A glob passes through modules that are private themselves.
fn targets(sources: &Sources, module: ModuleId, import: &Import) -> impl Iterator<Item = (Named, String)> {
    let place = sources.place(module, import.line);
    let found = sources.resolve(module, &import.path).into_iter().filter(|found| !found.member);
    let kept = found.filter(|found| import.name.is_none() || is_public(sources, &found.named));
    kept.map(move |found| (found.named, place.clone()))
}

fn is_handed_on(sources: &Sources, module: ModuleId, export: &Export) -> bool {
    let home = sources.defined_in(&export.named).map(|module| sources.line_of(module)[0]);
    export.reexport && home != Some(sources.line_of(module)[0]) && HANDED_ON.contains(&export.name.as_str())
}

fn is_public(sources: &Sources, named: &Named) -> bool {
    match named {
        Named::Module(module) => sources.modules[*module].scope.is_none(),
        Named::Item(item) => sources.items[*item].scope.is_none(),
        Named::Outside(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::small::sources;

    fn doubles(files: &[(&str, &str)]) -> Vec<String> {
        check(&sources(files)).into_iter().map(|fault| format!("{} {}", fault.place, fault.what)).collect()
    }

    #[test]
    fn a_public_module_and_a_reexport_are_two_paths() {
        let files =
            |lib| [("one/lib.rs", lib), ("one/chat.rs", "mod inner {} pub struct Message; pub(crate) struct Own;")];
        let both = ["one/lib.rs:2 `one::Message`, `one::chat::Message`"];
        assert_eq!(doubles(&files("pub mod chat;\npub use chat::Message;")), both);
        assert_eq!(doubles(&files("pub mod chat;\npub use chat::*;")), both);
        for one_path in ["mod chat; pub use chat::Message;", "pub mod chat;", "pub mod chat; use chat::Message;"] {
            assert!(doubles(&files(one_path)).is_empty(), "{one_path}");
        }
        assert!(doubles(&files("pub mod chat; pub(crate) use chat::Message;")).is_empty());
        assert_eq!(doubles(&files("mod chat; pub use chat::Message; pub use chat::Message as M;")).len(), 1);
    }

    #[test]
    fn a_function_may_have_its_private_modules_name() {
        let files = [("one/lib.rs", "mod bleu; pub use bleu::bleu;"), ("one/bleu.rs", "pub fn bleu() {}")];
        assert!(doubles(&files).is_empty());
    }

    #[test]
    fn a_module_with_two_paths_is_one_fault() {
        let files = [("one/lib.rs", "pub mod a; pub use a as b;"), ("one/a.rs", "pub struct X; pub struct Y;")];
        assert_eq!(doubles(&files), ["one/lib.rs:1 `one::a`, `one::b`"]);
    }

    #[test]
    fn reexports_of_another_crate_are_paths() {
        let files = |two| [("one/lib.rs", "pub mod a { pub struct X; } pub struct Y;"), ("two/lib.rs", two)];
        let found = doubles(&files("pub use one::a::X;\npub use ::one::Y as Z;"));
        assert_eq!(found, ["two/lib.rs:1 `two::X`, `one::a::X`", "two/lib.rs:2 `one::Y`, `two::Z`"]);
        assert_eq!(doubles(&files("pub use one;")), ["two/lib.rs:1 the crate `one` is also `two::one`"]);
        assert!(doubles(&files("use one::a::X;")).is_empty());
    }

    #[test]
    fn what_others_define_may_be_exported_once() {
        let found = |two| doubles(&[("one/lib.rs", "pub use ::image::GrayImage;"), ("two/lib.rs", two)]);
        assert!(found("use image::GrayImage;").is_empty());
        assert_eq!(found("pub use image::GrayImage;"), ["one/lib.rs:1 `one::GrayImage`, `two::GrayImage`"]);
    }

    #[test]
    fn what_is_handed_on_may_be_exported_by_each_crate() {
        let files = |one, two| [("one/lib.rs", one), ("two/lib.rs", two)];
        assert!(doubles(&files("pub use ::image::RgbImage;", "pub use ::image::RgbImage;")).is_empty());
        assert!(doubles(&files("pub struct Message;", "pub use one::Message;")).is_empty());
        assert_eq!(doubles(&files("pub struct Message; pub mod m { pub use super::Message; }", "")).len(), 1);
    }

    #[test]
    fn variants_are_no_second_path_to_their_enum() {
        assert!(doubles(&[("one/lib.rs", "pub enum Kind { A } pub use Kind::A; pub use self::Kind::*;")]).is_empty());
    }
}
