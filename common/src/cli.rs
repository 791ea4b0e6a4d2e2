//! The common parts of the command lines of all programs.
//!
//! No task. Previous stop: `main` of each program, which parses the command line; next stop: the program's `cli` room, or its
//! `run`.

use std::fmt;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Command, Parser, Subcommand};
use clap_complete::Shell;
use serde_json::json;

use crate::Config;
use crate::config::{ConfigProblem, UnreadableFile};
use crate::doctor::access::Identity;
use crate::doctor::identity::{self, Sources};
use crate::doctor::{self, Program};

/// The exit code of `check-config` if only `--strict` reports a problem.
const ONLY_WARNINGS: u8 = 1;
/// The exit code of `check-config` where the program would not start.
const MISTAKES: u8 = 2;

/// The exit code for a wrong command line, as `EX_USAGE` of sysexits.h: distinct from the results of commands.
const USAGE: u8 = 64;

/// Runs a program with its command line, and returns the exit code.
#[must_use]
pub fn run<A: Parser>(program: impl FnOnce(A) -> ExitCode) -> ExitCode {
    A::try_parse().map_or_else(|error| refused(&error), program)
}

/// Prints why a command fails, with the causes.
pub fn print_error(error: &dyn fmt::Display) {
    // An error of stderr cannot be reported anywhere.
    let _ = writeln!(io::stderr(), "error: {error:#}");
}

/// Prints the error of a command line, or the requested help or version, and returns the exit code.
#[must_use]
pub fn refused(error: &clap::Error) -> ExitCode {
    match error.print() {
        Err(_) => ExitCode::FAILURE,
        Ok(()) if error.use_stderr() => USAGE.into(),
        Ok(()) => ExitCode::SUCCESS,
    }
}

/// Which file is read.
#[derive(Debug, Args)]
pub struct ConfigFile {
    /// Reads this file instead of /etc/wgkex.yaml or the one that `WGKEX_CONFIG_FILE` names
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ConfigFile {
    /// The file, if the command line names one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.config.as_deref()
    }
}

/// The command `check-config`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exits with 0 if it is valid, with 1 if there are only warnings and --strict is given, with 2 if the program would not start."
)]
pub struct CheckConfig {
    /// Exit with 1 where there are warnings
    #[arg(long)]
    strict: bool,
    /// Print the problems as JSON
    #[arg(long)]
    json: bool,
}

impl CheckConfig {
    /// Prints the problems of the config and returns the exit code: 0 if there are none, 1 if there are warnings and
    /// the check is strict, 2 if `program` would not start.
    #[must_use]
    pub fn run(&self, file: Option<&Path>, program: Program) -> ExitCode {
        let (mistakes, warnings) = match Config::load(file) {
            Ok(config) => {
                let (mistakes, missed) = unreadable_files(&config, program);
                (mistakes, [config.warnings, missed].concat())
            }
            Err(error) => (error.mistakes, error.warnings),
        };
        let text = if self.json {
            format!("{:#}\n", json!({ "errors": mistakes, "warnings": warnings }))
        } else {
            report(&mistakes, &warnings)
        };
        match io::stdout().write_all(text.as_bytes()) {
            Err(_) => ExitCode::FAILURE,
            Ok(()) if !mistakes.is_empty() => MISTAKES.into(),
            Ok(()) if self.strict && !warnings.is_empty() => ONLY_WARNINGS.into(),
            Ok(()) => ExitCode::SUCCESS,
        }
    }
}

/// The commands that write what packages ship beside a program, from its own definition of its command line.
#[derive(Debug, Subcommand)]
pub enum Documents {
    /// Prints the completions for a shell
    #[command(after_help = "Exits with 0, or with 1 if they cannot be written.")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Writes the manual pages, one for each command
    #[command(hide = true, after_help = "Exits with 0, or with 1 if they cannot be written.")]
    ManPages {
        /// The directory in which they are written
        dir: PathBuf,
    },
}

impl Documents {
    /// Writes the requested files for the program that has this `command` line, and returns the exit code.
    #[must_use]
    pub fn run(&self, command: Command) -> ExitCode {
        match self.write(command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(io::stderr(), "error: cannot be written: {error}");
                ExitCode::FAILURE
            }
        }
    }

    fn write(&self, mut command: Command) -> io::Result<()> {
        match self {
            Self::ManPages { dir } => clap_mangen::generate_to(command, dir),
            Self::Completions { shell } => {
                let (name, mut text) = (command.get_name().to_owned(), Vec::new());
                clap_complete::generate(*shell, &mut command, name, &mut text);
                io::stdout().write_all(&text)
            }
        }
    }
}

/// The files that cannot be read: those without which `program` does not start, and the others. Checked for the caller,
/// or for the user as whom the program serves.
fn unreadable_files(config: &Config, program: Program) -> (Vec<ConfigProblem>, Vec<ConfigProblem>) {
    let mut files = config.unreadable_files();
    let worker_user = config.worker_user.as_deref().filter(|_| program == Program::Worker);
    let user = identity::find(program, Sources { config: worker_user, ..Sources::default() });
    // The doctor reports an unknown user.
    if let Some(user) = user.ok().filter(Identity::is_another) {
        let known: Vec<_> = files.iter().map(|file| file.problem.key.clone()).collect();
        let denied = doctor::files::denied(config, program, &user).into_iter();
        files.extend(denied.filter(|file| !known.contains(&file.problem.key)));
    }
    let (needed, others): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| program.needs(file.needed_by));
    let problems = |files: Vec<UnreadableFile>| files.into_iter().map(|file| file.problem).collect();
    (problems(needed), problems(others))
}

fn report(mistakes: &[ConfigProblem], warnings: &[ConfigProblem]) -> String {
    let lines =
        |kind: &str, problems: &[ConfigProblem]| problems.iter().map(|problem| format!("{kind}: {problem}")).collect();
    let result = match (mistakes.len(), warnings.len()) {
        (0, 0) => "the config is valid".to_owned(),
        (0, warnings) => format!("the config is valid, with warnings: {warnings}"),
        (mistakes, warnings) => format!("the config is not valid: errors: {mistakes}, warnings: {warnings}"),
    };
    let parts: [Vec<String>; 3] = [lines("error", mistakes), lines("warning", warnings), vec![result]];
    parts.concat().join("\n") + "\n"
}
