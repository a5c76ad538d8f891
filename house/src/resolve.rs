//! From a path as it is written to what it names, as rustc resolves it: re-exports are followed to the definition.

use super::sources::{Import, ItemId, MACRO, ModuleId, NamePath, Scope, Sources, TYPE, VALUE};

const EVERY: u8 = TYPE | VALUE | MACRO;

/// An import, by its module and place there, and the name that is sought through it.
type Question = (ModuleId, usize, String);

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Named {
    Module(ModuleId),
    Item(ItemId),
    /// Something of another workspace's crate, or of the language; its path.
    Outside(String),
}

/// One thing that a name stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub named: Named,
    pub namespaces: u8,
    /// The path goes on inside the item: a variant, an associated function.
    pub member: bool,
}

impl Sources {
    /// What `path`, written in `module`, stands for: one thing per namespace, nothing where the path leads nowhere.
    pub fn resolve(&self, module: ModuleId, path: &NamePath) -> Vec<Found> {
        self.follow(module, path, &mut Vec::new())
    }

    /// The import by which a path that begins with `name` comes to mean what it does, unless a glob brings it.
    pub fn import_of(&self, module: ModuleId, name: &str) -> Option<&Import> {
        self.modules[module].imports.iter().find(|import| import.name.as_deref() == Some(name))
    }

    /// Whether the module itself declares `name`.
    pub fn declares(&self, module: ModuleId, name: &str) -> bool {
        let here = &self.modules[module];
        here.items.iter().any(|item| self.items[*item].name == name)
            || here.children.iter().any(|child| self.modules[*child].name == name)
    }

    /// The module in which the named thing is defined, a module being defined in its own file.
    pub fn defined_in(&self, named: &Named) -> Option<ModuleId> {
        match named {
            Named::Module(module) => Some(*module),
            Named::Item(item) => Some(self.items[*item].module),
            Named::Outside(_) => None,
        }
    }

    /// The path by which its own crate defines it; it need not be public.
    pub fn full_path(&self, named: &Named) -> String {
        match named {
            Named::Module(module) => self.path_of(*module),
            Named::Item(item) => format!("{}::{}", self.path_of(self.items[*item].module), self.items[*item].name),
            Named::Outside(path) => path.clone(),
        }
    }

    fn may_use(&self, from: ModuleId, scope: Scope) -> bool {
        scope.is_none_or(|within| self.line_of(from).contains(&within))
    }

    /// `asked` are the imports that are being followed, each for a name: none is followed for the sake of itself.
    fn follow(&self, module: ModuleId, path: &NamePath, asked: &mut Vec<Question>) -> Vec<Found> {
        let Some((first, mut rest)) = path.names.split_first() else { return Vec::new() };
        let at = |module| vec![Found { named: Named::Module(module), namespaces: TYPE, member: false }];
        let line = self.line_of(module);
        let mut found = match first.as_str() {
            _ if path.absolute => self.other_crate(first),
            "crate" => at(line[0]),
            "self" => at(module),
            "super" => {
                let supers = 1 + rest.iter().take_while(|name| *name == "super").count();
                rest = &rest[supers - 1..];
                let Some(place) = line.len().checked_sub(1 + supers) else { return Vec::new() };
                at(line[place])
            }
            _ => {
                let here = self.lookup(module, first, module, asked);
                let wanted = if rest.is_empty() { EVERY } else { TYPE };
                if here.iter().any(|found| found.namespaces & wanted != 0) { here } else { self.other_crate(first) }
            }
        };
        for name in rest {
            let containers = found.into_iter().filter(|found| found.namespaces & TYPE != 0);
            found = containers
                .flat_map(|found| match found.named {
                    Named::Module(inside) => self.lookup(inside, name, module, asked),
                    Named::Item(_) => vec![Found { namespaces: EVERY, member: true, ..found }],
                    Named::Outside(path) => vec![outside(format!("{path}::{name}"))],
                })
                .collect();
        }
        found
    }

    /// What `name` stands for in `module`, asked from `from`.
    fn lookup(&self, module: ModuleId, name: &str, from: ModuleId, asked: &mut Vec<Question>) -> Vec<Found> {
        let here = &self.modules[module];
        let mut found = Vec::new();
        for id in &here.items {
            let item = &self.items[*id];
            if item.name == name && self.may_use(from, item.scope) {
                found.push(Found { named: Named::Item(*id), namespaces: item.namespaces, member: false });
            }
        }
        for id in &here.children {
            if self.modules[*id].name == name && self.may_use(from, self.modules[*id].scope) {
                found.push(Found { named: Named::Module(*id), namespaces: TYPE, member: false });
            }
        }
        let mut globs = Vec::new();
        for (at, import) in here.imports.iter().enumerate() {
            let question = (module, at, name.to_owned());
            if !self.may_use(from, import.scope) || asked.contains(&question) {
                continue;
            }
            match &import.name {
                None => globs.push(question),
                Some(other) if other == name => {
                    asked.push(question);
                    found.extend(self.follow(module, &import.path, asked));
                    asked.pop();
                }
                Some(_) => {}
            }
        }
        // A name that stands there outranks one that a glob brings.
        let taken = found.iter().fold(0, |taken, found| taken | found.namespaces);
        for question in globs.into_iter().filter(|_| taken != EVERY) {
            let path = &here.imports[question.1].path;
            asked.push(question);
            for all in self.follow(module, path, asked) {
                if let Named::Module(inside) = all.named {
                    let brought = self.lookup(inside, name, module, asked);
                    found.extend(brought.into_iter().filter(|found| found.namespaces & !taken != 0));
                }
            }
            asked.pop();
        }
        found
    }

    fn other_crate(&self, name: &str) -> Vec<Found> {
        let root = self.roots.iter().find(|root| root.library && self.modules[root.module].name == name);
        vec![root.map_or_else(
            || outside(name.to_owned()),
            |root| Found { named: Named::Module(root.module), namespaces: TYPE, member: false },
        )]
    }
}

fn outside(path: String) -> Found {
    Found { named: Named::Outside(path), namespaces: EVERY, member: false }
}

#[cfg(test)]
mod tests {
    use super::super::small::sources;
    use super::*;

    /// What `path`, written in the module `from`, stands for.
    fn resolved(sources: &Sources, from: &str, path: &str) -> Vec<String> {
        let module = (0..sources.modules.len()).find(|module| sources.path_of(*module) == from).expect("it exists");
        let absolute = path.starts_with("::");
        let names = path.trim_start_matches("::").split("::").map(str::to_owned).collect();
        let found = sources.resolve(module, &NamePath { absolute, names });
        found.iter().map(|found| sources.full_path(&found.named)).collect()
    }

    #[test]
    fn paths_are_resolved_as_rustc_does() {
        let sources = sources(&[
            ("one/lib.rs", "mod a; pub mod b; pub use a::Deep as Renamed; pub use b::*;"),
            ("one/a/mod.rs", "mod deep; pub use deep::Deep; pub(super) fn helper() {} fn own() {}"),
            ("one/a/deep.rs", "pub struct Deep; use super::super::b as other; pub(in crate::a) fn near() {}"),
            ("one/b.rs", "mod inner { pub fn shown() {} } pub use self::inner::shown; pub enum Kind { A }"),
            ("two/lib.rs", "use one::Renamed as R; use std::fmt; mod one { pub fn f() {} } fn helper() {}"),
        ]);
        let is = |from, path, to: &[&str]| assert_eq!(resolved(&sources, from, path), to, "{path} in {from}");
        is("one", "a::Deep", &["one::a::deep::Deep"]);
        is("one", "Renamed", &["one::a::deep::Deep"]);
        is("one", "a::helper", &["one::a::helper"]);
        is("one", "a::own", &[]); // private to `a`
        is("one::a::deep", "super::own", &["one::a::own"]);
        is("one::a", "deep::near", &["one::a::deep::near"]);
        is("one", "a::deep::near", &[]);
        is("one::a::deep", "other::shown", &["one::b::inner::shown"]);
        is("one::a::deep", "crate::Kind::A", &["one::b::Kind"]); // by the glob; a variant is its enum's
        is("one", "shown", &["one::b::inner::shown"]);
        is("two", "one::f", &["two::one::f"]); // a module outranks a crate
        is("two", "::one::Renamed", &["one::a::deep::Deep"]);
        is("two", "fmt::Display", &["std::fmt::Display"]);
        is("two", "tch::Tensor", &["tch::Tensor"]);
    }

    #[test]
    fn names_are_told_apart_by_namespace() {
        let sources = sources(&[
            ("one/lib.rs", "mod bleu; pub use bleu::bleu; mod user { use super::bleu::bleu; }"),
            ("one/bleu.rs", "pub fn bleu() {}"),
        ]);
        assert_eq!(resolved(&sources, "one::user", "bleu"), ["one::bleu::bleu"]);
        assert_eq!(resolved(&sources, "one", "bleu::bleu"), ["one::bleu::bleu"]);
        assert_eq!(resolved(&sources, "one", "bleu"), ["one::bleu", "one::bleu::bleu"]);
    }

    #[test]
    fn a_name_may_come_from_an_import_of_the_same_name() {
        let sources = sources(&[
            ("one/lib.rs", "mod a; mod b;"),
            ("one/a.rs", "pub mod x { pub fn x() {} }"),
            ("one/b.rs", "use crate::a::x; use x::x;"),
        ]);
        let mut found = resolved(&sources, "one::b", "x");
        found.dedup();
        assert_eq!(found, ["one::a::x", "one::a::x::x"]);
    }

    #[test]
    fn imports_in_a_circle_end() {
        let sources = sources(&[
            ("one/lib.rs", "pub mod a; pub mod b; use tch;"),
            ("one/a.rs", "pub use crate::b::*; pub use super::b::x;"),
            ("one/b.rs", "pub use crate::a::*; pub use super::a::x;"),
        ]);
        assert_eq!(resolved(&sources, "one", "a::x"), [""; 0]);
        assert_eq!(resolved(&sources, "one", "a::y"), [""; 0]);
        assert_eq!(resolved(&sources, "one", "tch::Tensor"), ["tch::Tensor"]);
    }
}
