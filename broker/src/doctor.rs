//! `doctor`: what is wrong with a broker, and what to do about it. No IO: [`crate::cli::doctor`] gathers [`Facts`], and
//! [`findings`] decides about them.
//!
//! Each room of checks is a file: [`fleet`], [`listeners`], [`workers`]; checks shared with the worker's doctor are in
//! [`wgkex_common::doctor`].
//!
//! No task, no state. Previous stop of a fact: [`crate::cli::doctor`]; next stop of a finding: the same command, which
//! prints it. No key passes here.

pub mod facts;
mod fleet;
mod listeners;
#[cfg(test)]
mod tests;
mod workers;

use wgkex_common::doctor::bus::MqttFacts;
use wgkex_common::doctor::files::{ListFacts, Running};
use wgkex_common::doctor::{Finding, Program, bus, clock, config, files};
use wgkex_common::http::connections::Capacity;

use self::facts::{BusFacts, Facts};
use crate::fleet::status::ProblemKind;
use crate::http::status::Status;

/// With room for fewer connections a fleet of 3,300 routers is kept waiting when all connect at once.
const CONNECTIONS_MIN: usize = 4096;

/// The findings of every check, in the order in which an operator would check.
#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let status = facts.running.as_ref().ok();
    let running = status.map(process);
    let mut findings = config(&facts.config_warnings);
    findings.extend(fleet::broker(facts));
    findings.extend(facts.ports.iter().map(|port| listeners::port(port, status)));
    findings.extend(files::needed(Program::Broker, &facts.state.user, &facts.needed));
    findings.extend(facts.certificates.iter().map(listeners::certificate));
    findings.extend(facts.embedded.iter().map(listeners::embedded));
    findings.extend(facts.mqtt.iter().flat_map(mqtt));
    findings.extend(workers::retained(facts));
    findings.extend(workers::named(facts));
    findings.extend(files::state(Program::Broker, &facts.state, running.as_ref()));
    // A list that the running broker cannot read is one of its problems, without the line.
    let is_problem = |key: &str| running.iter().any(|running| running.lists_damaged.iter().any(|list| list == key));
    let is_new = |list: &&ListFacts| list.damage.is_some() || !is_problem(list.key);
    let lists: Vec<_> = facts.lists.iter().filter(is_new).cloned().collect();
    findings.extend(files::lists(Program::Broker, &facts.state.user, &lists, running.as_ref()));
    findings.extend(facts.tokens.iter().map(listeners::tokens));
    findings.extend(facts.files.map(open_files));
    findings.push(clock::clock(Program::Broker, &facts.clock));
    findings
}

/// The process data that the running broker publishes.
fn process(status: &Status) -> Running {
    let subjects = |is_it: fn(ProblemKind) -> bool| {
        status.problems.iter().filter(move |problem| is_it(problem.kind)).map(|problem| problem.subject.clone())
    };
    let is_list = |kind| matches!(kind, ProblemKind::ListDamaged | ProblemKind::AllowListUnread);
    Running {
        pid: status.pid,
        keeps_state: subjects(|kind| kind == ProblemKind::StateNotKept).next().is_none(),
        lists_damaged: subjects(is_list).collect(),
    }
}

/// Another MQTT server.
fn mqtt(MqttFacts { server, outcome }: &MqttFacts<BusFacts>) -> Vec<Finding> {
    match outcome {
        Err(failure) => vec![bus::no_connection(Program::Broker, server, failure)],
        Ok(found) => bus::rights(Program::Broker, server, &found.rights),
    }
}

fn open_files(files: usize) -> Finding {
    let (subject, open) = ("files", Capacity::of_files(files).open);
    let found = format!("the running broker may open {files}, which is enough for {open} connections of routers");
    if open < CONNECTIONS_MIN {
        Finding::warn(subject, found, "set LimitNOFILE=524288 in its unit, or `ulimit -n` where it is started")
    } else {
        Finding::ok(subject, found)
    }
}
