//! Checks of the files that a program keeps and reads.

use std::path::{Path, PathBuf};

use super::access::{Access, Identity, Need, Unknown, find};
use super::{Finding, Level, Program, Trouble};
use crate::access_lists::files::Files;
use crate::config::KeyLists;
use crate::storage::process_lock::Holder;

/// The program that answers on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// Its process, as it numbers itself.
    pub pid: u32,
    /// Whether it can write its state.
    pub keeps_state: bool,
    /// The lists that it cannot read.
    pub lists_damaged: Vec<String>,
}

/// Where the state is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateFacts {
    /// `state_dir`.
    pub dir: PathBuf,
    /// The user as whom the program serves.
    pub user: String,
    /// Whether this user may write there.
    pub access: Access,
    /// Who has the program's state file; or why that is not known.
    pub holder: Result<Option<Holder>, String>,
}

/// A file or directory of an access list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListFacts {
    /// The key of the config that names it.
    pub key: &'static str,
    /// Where it is.
    pub path: PathBuf,
    /// Whether the program may read it.
    pub access: Access,
    /// What is wrong with its content, with the line; none if nothing is, or if it was not read.
    pub damage: Option<String>,
}

impl StateFacts {
    /// Those of the state file `name` in `dir`.
    #[must_use]
    pub fn of(dir: &Path, name: &str, user: Result<&Identity, &Unknown>) -> Self {
        let file = dir.join(name);
        let mut access = find(dir, user, Need::Write);
        if access == Access::Granted && file.exists() {
            access = find(&file, user, Need::Write);
        }
        let holder = Holder::of(&file).map_err(|error| error.to_string());
        let user = user.map_or_else(|unknown| &unknown.name, |user| &user.name);
        Self { dir: dir.to_owned(), user: user.clone(), access, holder }
    }
}

impl ListFacts {
    /// Those of all lists that the config names.
    #[must_use]
    pub fn of(lists: &KeyLists, user: Result<&Identity, &Unknown>) -> Vec<Self> {
        let KeyLists { deny_file, deny_dir, allow, trusted_dir, .. } = lists;
        let allow = allow.as_ref();
        let paths: [(&'static str, Option<&PathBuf>, Need); 5] = [
            ("blacklist_file", deny_file.as_ref(), Need::Read),
            ("allowlist.file", allow.and_then(|allow| allow.file.as_ref()), Need::Read),
            ("key_lists.deny_dir", deny_dir.as_ref(), Need::List),
            ("key_lists.allow_dir", allow.and_then(|allow| allow.dir.as_ref()), Need::List),
            ("key_lists.trusted_dir", trusted_dir.as_ref(), Need::List),
        ];
        let mut files = Files::new(lists);
        files.read(true);
        let facts = paths.into_iter().filter_map(|(key, path, need)| {
            let path = path?.clone();
            let access = find(&path, user, need);
            let damage = files.damages().find(|(list, _)| *list == key && access == Access::Granted);
            Some(Self { key, damage: damage.map(|(_, damage)| damage.to_owned()), access, path })
        });
        facts.collect()
    }
}

/// Whether the state can be written, and who has it.
#[must_use]
pub fn state(program: Program, facts: &StateFacts, running: Option<&Running>) -> Vec<Finding> {
    let StateFacts { dir, user, access, .. } = facts;
    let (dir, word) = (dir.display(), program.word());
    let make = format!("`install -d -m 700 -o {user} {dir}` and `chown -R {user} {dir}`, or name another state_dir");
    let is_kept = running.is_some_and(|running| running.keeps_state);
    let kept = match access {
        _ if is_kept => Finding::ok("state", format!("the running {word} writes to {dir}")),
        Access::Granted => Finding::ok("state", format!("{user} may write to {dir}")),
        Access::Creatable => Finding::ok("state", format!("{dir} is not there yet, and {user} may make it")),
        Access::OnlyFor(other) => Finding::warn(
            "state",
            format!("{dir} is writable for {other} and not for {user}"),
            format!("start the {word} as {other} ({}), or {make}", program.user()),
        ),
        Access::Denied(reason) => Finding::fail("state", format!("{user} cannot write to {dir}: {reason}"), make),
    };
    [kept].into_iter().chain(holder(program, facts, running)).collect()
}

/// Whether it is the program that answers here which has the state file.
fn holder(program: Program, facts: &StateFacts, running: Option<&Running>) -> Option<Finding> {
    let (word, listen) = (program.word(), program.listen());
    let holder = match &facts.holder {
        Ok(holder) => holder.as_ref()?,
        Err(error) => {
            let found = format!("who has the state file cannot be told: {error}");
            return Some(Finding::warn("state", found, "run the doctor as root"));
        }
    };
    Some(match running {
        Some(Running { pid, .. }) if holder.pid.is_none_or(|holder| holder == *pid) => {
            Finding::ok("state", format!("the running {word} has its state file"))
        }
        Some(Running { pid, .. }) => Finding::fail(
            "state",
            format!("{holder} has the state file, and {word} {pid} answers on {listen}: two {word}s on one machine"),
            "end one of them",
        ),
        None => Finding::warn(
            "state",
            format!("{holder} has the state file, and no {word} answers on {listen}"),
            format!("if it has not just been started, look at its log; a second {word} does not start"),
        ),
    })
}

/// Whether the lists can be read.
#[must_use]
pub fn lists(program: Program, user: &str, lists: &[ListFacts], running: Option<&Running>) -> Vec<Finding> {
    let is_damaged = |running: &Running, key: &str| running.lists_damaged.iter().any(|damaged| damaged == key);
    let check = |list: &ListFacts| match running {
        Some(running) => read_list(program, list, is_damaged(running, list.key)),
        None => unread_list(program, list, user),
    };
    lists.iter().map(check).collect()
}

/// The state of a list in the running program, whichever program that is.
fn read_list(program: Program, list: &ListFacts, is_damaged: bool) -> Finding {
    let ListFacts { key, path, damage, .. } = list;
    let (path, word) = (path.display(), program.word());
    if let Some(damage) = damage {
        return Finding::fail(
            key,
            format!("{path}: {damage}: what the running {word} last read of it counts"),
            "correct it: it is read again by itself",
        );
    }
    let damaged = is_damaged.then(|| Trouble {
        found: format!("the running {word} cannot read {path}, or it is damaged: what it last read counts"),
        advice: "its log says why, with the line".into(),
    });
    Finding::judge(key, Level::Fail, format!("the running {word} has read {path}"), damaged)
}

fn unread_list(program: Program, ListFacts { key, path, access, damage }: &ListFacts, user: &str) -> Finding {
    let (path, advice) = (path.display(), format!("let {user} read it (chmod, chown)"));
    if let Some(damage) = damage {
        return Finding::fail(key, format!("{path}: {damage}"), "correct it");
    }
    match access {
        Access::Granted => Finding::ok(key, format!("{user} may read {path}")),
        Access::Creatable => {
            Finding::fail(key, format!("{path} is missing"), format!("write it, or take {key} out of the config"))
        }
        Access::OnlyFor(other) => {
            let advice = format!("start the {} as {other} ({}), or {advice}", program.word(), program.user());
            Finding::warn(key, format!("{path} is readable for {other} and not for {user}"), advice)
        }
        Access::Denied(reason) => Finding::fail(key, format!("{user} cannot read {path}: {reason}"), advice),
    }
}
