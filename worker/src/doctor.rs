//! `doctor`: finds problems of a gateway and suggests remedies. No IO: [`crate::cli::doctor`] gathers [`Facts`], and
//! [`findings`] evaluates them.
//!
//! Each group of checks is a file: [`process`], [`interfaces`], [`machine`], [`bus`]; the checks that the broker's
//! doctor makes, too, are in [`wgkex_common::doctor`].
//!
//! No task, no state. Previous stop of a fact: [`crate::cli::doctor`]; next stop of a finding: the same command, which
//! prints it. No key passes here.

mod bus;
pub mod facts;
mod interfaces;
mod machine;
mod process;
#[cfg(test)]
mod tests;

use wgkex_common::doctor::{Finding, Level, Program, clock, config, files, worst};

use self::facts::Facts;

/// The findings of every check, in the order in which an operator would check.
#[must_use]
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings = config(&facts.config_warnings);
    findings.extend(process::runs(facts));
    findings.push(machine::capability(facts.has_net_admin));
    findings.push(machine::wireguard(facts));
    findings.extend(facts.uplinks.iter().filter_map(|uplink| machine::uplink(uplink, &facts.domains)));
    for domain in &facts.domains {
        let found = interfaces::domain(domain, facts.is_setup_named);
        let down = process::domain_down(domain, facts.running.as_ref()).filter(|_| worst(&found) < Level::Fail);
        findings.extend(found.into_iter().chain(down));
    }
    findings.extend(facts.servers.iter().map(|server| machine::server(server, facts.running.as_ref())));
    findings.extend(machine::managers(&facts.managers));
    findings.push(clock::clock(Program::Worker, &facts.clock));
    let running = facts.running.as_ref().map(|worker| &worker.process);
    findings.extend(files::state(Program::Worker, &facts.state, running));
    findings.extend(facts.running.as_ref().and_then(process::kept));
    findings.extend(files::needed(Program::Worker, &facts.state.user, &facts.needed));
    findings.extend(files::lists(Program::Worker, &facts.state.user, &facts.lists, running));
    findings.extend(bus::mqtt(facts));
    findings
}
