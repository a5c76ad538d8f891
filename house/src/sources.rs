//! The modules of the workspace as their files declare them: items, imports, and where each lies. Code for tests is
//! left out.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, Fields, Item, UseTree, Visibility};

use super::test_code;
use super::workspace::Target;

pub type ModuleId = usize;
pub type ItemId = usize;

/// Namespaces of Rust: a name may be a type (or module), a value and a macro at once.
pub const TYPE: u8 = 1;
pub const VALUE: u8 = 2;
pub const MACRO: u8 = 4;

/// Who may use a name: everybody, or a module and those in it.
pub type Scope = Option<ModuleId>;

/// All modules of all crates.
#[derive(Default)]
pub struct Sources {
    pub modules: Vec<Module>,
    pub items: Vec<Definition>,
    /// The root modules of libraries and of programs.
    pub roots: Vec<Root>,
}

#[derive(Debug)]
pub struct Root {
    pub module: ModuleId,
    pub library: bool,
}

/// A module, in a file of its own or written inside its parent's.
#[derive(Default)]
pub struct Module {
    /// Of a root, the crate's name.
    pub name: String,
    pub parent: Option<ModuleId>,
    pub children: Vec<ModuleId>,
    /// Where its code lies, relative to the workspace.
    pub file: PathBuf,
    /// Whether the file is its parent's.
    pub inline: bool,
    pub scope: Scope,
    /// `file:line` of its declaration.
    pub place: String,
    pub items: Vec<ItemId>,
    pub imports: Vec<Import>,
    /// Its items, child modules left out.
    pub code: Vec<Item>,
    /// The lines of the file that are for tests.
    pub test_lines: Rc<BTreeSet<usize>>,
}

/// An item that is no module.
#[derive(Debug)]
pub struct Definition {
    pub name: String,
    pub module: ModuleId,
    pub namespaces: u8,
    pub scope: Scope,
    pub line: usize,
}

/// A path as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePath {
    /// Begins with `::`.
    pub absolute: bool,
    pub names: Vec<String>,
}

/// One name that a `use` brings, or a glob.
#[derive(Debug)]
pub struct Import {
    /// None is a glob.
    pub name: Option<String>,
    pub path: NamePath,
    pub scope: Scope,
    pub line: usize,
}

impl Sources {
    /// Reads every module of `targets`, which lie below `root`.
    ///
    /// # Errors
    /// A file cannot be read or is no Rust.
    pub fn read(root: &Path, targets: &[Target]) -> Result<Self> {
        let mut sources = Self::default();
        for target in targets {
            let module = sources.add_module(&target.name, None, None);
            sources.roots.push(Root { module, library: target.library });
            let folder = target.file.parent().context("a crate's root has a folder")?;
            sources.read_file(root, module, &target.file, folder)?;
        }
        Ok(sources)
    }

    /// `crate_name::a::b`
    pub fn path_of(&self, module: ModuleId) -> String {
        let Module { name, parent, .. } = &self.modules[module];
        parent.map_or_else(|| name.clone(), |parent| format!("{}::{name}", self.path_of(parent)))
    }

    /// The module and those around it, outermost first.
    pub fn line_of(&self, module: ModuleId) -> Vec<ModuleId> {
        let mut line: Vec<_> = std::iter::successors(Some(module), |module| self.modules[*module].parent).collect();
        line.reverse();
        line
    }

    /// The module whose file holds the code of this one.
    pub fn home(&self, module: ModuleId) -> ModuleId {
        match self.modules[module] {
            Module { inline: true, parent: Some(parent), .. } => self.home(parent),
            _ => module,
        }
    }

    /// `file:line` in the module's file.
    pub fn place(&self, module: ModuleId, line: usize) -> String {
        format!("{}:{line}", self.modules[module].file.display())
    }

    fn add_module(&mut self, name: &str, parent: Option<ModuleId>, scope: Scope) -> ModuleId {
        let id = self.modules.len();
        self.modules.push(Module { name: name.to_owned(), parent, scope, ..Module::default() });
        if let Some(parent) = parent {
            self.modules[parent].children.push(id);
        }
        id
    }

    /// Reads the module's file; its children lie in `folder`.
    fn read_file(&mut self, root: &Path, module: ModuleId, file: &Path, folder: &Path) -> Result<()> {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let parsed = syn::parse_file(&text)
            .map_err(|err| anyhow::anyhow!("{}:{}: {err}", file.display(), err.span().start().line))?;
        self.modules[module].file = file.strip_prefix(root).unwrap_or(file).to_owned();
        self.modules[module].test_lines = Rc::new(test_code::lines(&parsed.items));
        self.add_items(root, module, parsed.items, folder)
    }

    fn add_items(&mut self, root: &Path, module: ModuleId, items: Vec<Item>, folder: &Path) -> Result<()> {
        for item in items {
            if test_code::marks(test_code::attributes(&item)) {
                continue;
            }
            if let Item::Mod(child) = item {
                self.add_child(root, module, child, folder)?;
                continue;
            }
            self.define(module, &item);
            let mut uses = Uses { sources: self, module, found: Vec::new() };
            uses.visit_item(&item);
            let found = uses.found;
            self.modules[module].imports.extend(found);
            self.modules[module].code.push(item);
        }
        Ok(())
    }

    fn add_child(&mut self, root: &Path, parent: ModuleId, child: syn::ItemMod, folder: &Path) -> Result<()> {
        let name = child.ident.to_string();
        let place = self.place(parent, child.ident.span().start().line);
        if child.attrs.iter().any(|attribute| attribute.path().is_ident("path")) {
            bail!("{place}: tidy does not follow `#[path]`; name the file after its module");
        }
        let scope = self.scope(parent, &child.vis);
        let module = self.add_module(&name, Some(parent), scope);
        self.modules[module].place = place;
        let inner = folder.join(&name);
        if let Some((_, items)) = child.content {
            let Module { file, test_lines, .. } = &self.modules[parent];
            let (file, test_lines) = (file.clone(), Rc::clone(test_lines));
            self.modules[module].file = file;
            self.modules[module].test_lines = test_lines;
            self.modules[module].inline = true;
            return self.add_items(root, module, items, &inner);
        }
        let beside = folder.join(format!("{name}.rs"));
        let file = if beside.is_file() { beside } else { inner.join("mod.rs") };
        self.read_file(root, module, &file, &inner)
    }

    fn define(&mut self, module: ModuleId, item: &Item) {
        if let Item::ForeignMod(block) = item {
            for item in &block.items {
                let (ident, visibility) = match item {
                    syn::ForeignItem::Fn(item) => (&item.sig.ident, &item.vis),
                    syn::ForeignItem::Static(item) => (&item.ident, &item.vis),
                    _ => continue,
                };
                let (scope, line) = (self.scope(module, visibility), ident.span().start().line);
                self.add_item(ident.to_string(), module, module, VALUE, scope, line);
            }
        }
        let fields = |fields: &Fields| if matches!(fields, Fields::Named(_)) { TYPE } else { TYPE | VALUE };
        let (ident, namespaces, visibility) = match item {
            Item::Const(item) => (&item.ident, VALUE, &item.vis),
            Item::Static(item) => (&item.ident, VALUE, &item.vis),
            Item::Fn(item) => (&item.sig.ident, VALUE, &item.vis),
            Item::Enum(item) => (&item.ident, TYPE, &item.vis),
            Item::Struct(item) => (&item.ident, fields(&item.fields), &item.vis),
            Item::Union(item) => (&item.ident, TYPE, &item.vis),
            Item::Trait(item) => (&item.ident, TYPE, &item.vis),
            Item::TraitAlias(item) => (&item.ident, TYPE, &item.vis),
            Item::Type(item) => (&item.ident, TYPE, &item.vis),
            Item::Macro(syn::ItemMacro { ident: Some(ident), attrs, .. }) => {
                let exported = attrs.iter().any(|attribute: &Attribute| attribute.path().is_ident("macro_export"));
                let at = if exported { self.line_of(module)[0] } else { module };
                let line = ident.span().start().line;
                return self.add_item(ident.to_string(), module, at, MACRO, (!exported).then_some(module), line);
            }
            _ => return,
        };
        let scope = self.scope(module, visibility);
        self.add_item(ident.to_string(), module, module, namespaces, scope, ident.span().start().line);
    }

    /// An item of `module` whose path begins at `at`.
    fn add_item(&mut self, name: String, module: ModuleId, at: ModuleId, namespaces: u8, scope: Scope, line: usize) {
        self.modules[at].items.push(self.items.len());
        self.items.push(Definition { name, module, namespaces, scope, line });
    }

    fn scope(&self, module: ModuleId, visibility: &Visibility) -> Scope {
        match visibility {
            Visibility::Public(_) => None,
            Visibility::Inherited => Some(module),
            Visibility::Restricted(within) => {
                let line = self.line_of(module); // the crate, .., the module
                let names = &within.path.segments;
                let deepest = line.len() - 1;
                let depth = match names[0].ident.to_string().as_str() {
                    "crate" => names.len() - 1,
                    "super" => deepest.saturating_sub(names.len()),
                    _ => deepest,
                };
                Some(line[depth.min(deepest)])
            }
        }
    }
}

/// Every `use` in an item; one inside a function counts as its module's, which may only add names.
struct Uses<'s> {
    sources: &'s Sources,
    module: ModuleId,
    found: Vec<Import>,
}

impl<'a> Visit<'a> for Uses<'_> {
    fn visit_item(&mut self, item: &'a Item) {
        if !test_code::marks(test_code::attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        let scope = self.sources.scope(self.module, &item.vis);
        self.found.extend(imports(item).into_iter().map(|import| Import { scope, ..import }));
    }
}

/// The names that a `use` brings; whose they are is not known yet.
pub fn imports(item: &syn::ItemUse) -> Vec<Import> {
    let mut found = Vec::new();
    flatten(&item.tree, &NamePath { absolute: item.leading_colon.is_some(), names: Vec::new() }, &mut found);
    found
}

fn flatten(tree: &UseTree, before: &NamePath, found: &mut Vec<Import>) {
    let with = |name: &syn::Ident| {
        let mut path = before.clone();
        if name != "self" || path.names.is_empty() {
            path.names.push(name.to_string());
        }
        path
    };
    let line = tree.span().start().line;
    match tree {
        UseTree::Path(path) => flatten(&path.tree, &with(&path.ident), found),
        UseTree::Group(group) => group.items.iter().for_each(|tree| flatten(tree, before, found)),
        UseTree::Glob(_) => found.push(Import { name: None, path: before.clone(), scope: None, line }),
        UseTree::Name(leaf) => {
            let path = with(&leaf.ident);
            found.push(Import { name: path.names.last().cloned(), path, scope: None, line });
        }
        UseTree::Rename(leaf) => {
            found.push(Import { name: Some(leaf.rename.to_string()), path: with(&leaf.ident), scope: None, line });
        }
    }
}
