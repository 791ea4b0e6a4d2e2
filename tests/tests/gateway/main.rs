//! End-to-end tests on real kernels: the real programs on hosts of their own, real WireGuard, and the C tools to
//! inspect it. Each scenario is a test in two lanes: `netns` with wireguard-go, `vm` with the kernel's WireGuard.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod address_owners;
mod bus;
mod doctor;
mod examples;
mod hub;
mod keys;
mod links;
mod own_server;
mod peers;
mod privacy;
mod reach;
mod read_only_commands;
mod servers;
mod several_gateways;
mod start_and_stop;

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use wgkex_tests::gateway::{Host, Lane};
use wgkex_tests::process::Process;
use wgkex_tests::wait_until;

macro_rules! lanes {
    ($($file:ident: $scenario:ident;)*) => {
        mod netns {
            $(#[test]
            #[ignore = "needs root: tests/run netns"]
            fn $scenario() {
                crate::$file::$scenario(wgkex_tests::gateway::Lane::Userspace);
            })*
        }
        mod vm {
            $(#[test]
            #[ignore = "needs WireGuard in the kernel: tests/run vm"]
            fn $scenario() {
                crate::$file::$scenario(wgkex_tests::gateway::Lane::Kernel);
            })*
        }
    };
}

lanes! {
    keys: a_router_gets_the_contracts_answers_and_the_gateway_its_three_objects;
    keys: each_key_is_in_the_kernel_at_the_instant_of_its_200;
    several_gateways: four_gateways_share_the_routers_by_weight_and_all_have_every_key;
    several_gateways: a_frozen_gateway_is_passed_over_within_the_budget_and_has_the_keys_when_it_thaws;
    own_server: gateways_on_other_machines_use_tls_and_only_their_own_rights;
    bus: a_broker_outage_leaves_the_peers_alone_and_it_serves_again_afterwards;
    bus: an_mqtt_server_outage_leaves_the_peers_alone_and_the_worker_reconnects;
    start_and_stop: a_stopped_worker_announces_it_and_leaves_the_kernel_unchanged;
    start_and_stop: a_worker_ends_in_time_although_mqtt_does_not_answer;
    start_and_stop: a_worker_ends_in_time_with_twenty_thousand_peers;
    start_and_stop: cap_net_admin_is_enough_and_its_absence_is_named;
    start_and_stop: a_listener_that_is_closed_from_outside_ends_the_broker_and_is_opened_again_by_the_worker;
    start_and_stop: a_worker_that_root_starts_gives_up_every_other_privilege_and_none_serves_setuid;
    servers: wa24_a_client_is_a_peer_within_two_seconds_and_another_ones_handshake_and_counters_stay;
    servers: wa25_a_gateway_keeps_the_clients_of_its_server_through_outages_and_is_right_after_them;
    servers: status_doctor_and_dry_run_show_the_servers;
    servers: wa26_a_node_leases_its_address_and_its_file_follows_the_registry;
    servers: a_server_that_the_registry_does_not_take_is_named;
    servers: a_client_reaches_the_server_by_the_config_that_the_command_prints;
    hub: os21_members_behind_nat_reach_each_other_through_the_hub_and_other_tenants_do_not;
    hub: members_learn_of_a_hub_that_changes;
    examples: a_router_joins_the_mesh_with_the_example_configs;
    start_and_stop: a_second_worker_does_not_start_and_a_killed_ones_successor_does;
    start_and_stop: sighup_applies_the_log_level_of_a_worker_and_names_what_the_rest_needs;
    read_only_commands: status_shows_what_is_served_and_what_is_wrong;
    read_only_commands: dry_run_shows_what_the_worker_would_change_and_changes_nothing;
    doctor: a_gateway_on_which_all_is_well_passes_and_a_stopped_worker_is_a_finding;
    doctor: each_fault_of_interfaces_is_named;
    doctor: each_fault_of_files_clock_and_other_managers_is_named;
    doctor: a_domain_that_the_workers_user_cannot_use_is_named;
    doctor: a_vxlan_whose_routers_have_another_id_is_named;
    doctor: each_fault_of_the_connection_and_a_second_machine_of_one_name_is_named;
    links: interfaces_may_be_missing_deleted_and_recreated;
    peers: a_repeated_key_keeps_its_handshake;
    peers: a_silent_peer_is_swept_and_a_foreign_one_stays;
    peers: a_flood_of_keys_evicts_only_unestablished_peers;
    peers: an_idle_routers_endpoint_is_forgotten_and_it_gets_through_again;
    peers: peers_that_vanish_are_back_with_routes_and_entries_and_a_denied_one_is_not;
    privacy: no_key_and_no_routers_address_is_in_logs_metrics_page_or_retained_messages;
    address_owners: a_gateways_key_is_no_routers_and_its_peer_stays;
    address_owners: an_address_stays_with_the_router_that_has_it_until_that_is_gone;
    address_owners: a_routers_peer_survives_misuse_of_its_key_by_others;
    address_owners: two_brokers_that_admit_two_keys_of_one_address_at_once_leave_every_gateway_with_the_same;
}

/// The time in which a program has to end.
const END: Duration = Duration::from_secs(2);

/// A gateway on its own: the broker with its embedded MQTT server, and the worker.
struct Single {
    broker: Process,
    worker: Process,
    host: Host,
}

impl Single {
    fn new(lane: Lane, config: &str) -> Self {
        let host = Host::new("gateway", lane);
        host.configure(config);
        host.setup();
        let broker = host.start_broker();
        let worker = host.start_worker();
        serves(&host);
        Self { broker, worker, host }
    }
}

/// Waits until both domains are served by the broker on `host` and some gateway. A 200 alone is not enough: v1 is answered
/// with it as long as no gateway has ever published its state.
fn serves(host: &Host) {
    for domain in ["test_a", "test_b"] {
        wait_until(&format!("{domain} is served"), || {
            let ready = host.try_get(5000, "/readyz").filter(|ready| ready.status == 200)?;
            let is_served = !ready.body.contains(domain) && host.try_post_to(domain, 1, READINESS_KEY) == Some(200);
            is_served.then_some(())
        });
    }
}

/// The key of the readiness check.
const READINESS_KEY: &str = "o52Ge+Rpj4CUSitVag9mS7pSXUesNM0ESnvj/wwehkg=";

/// Ends a program as an init system does, and checks that it ends in time and with success.
fn end(process: &mut Process, signal: Signal) {
    let begun = Instant::now();
    process.signal(signal);
    process.wait_for_program();
    let took = begun.elapsed();
    let status = process.wait();
    assert!(status.success(), "{signal}: {status}");
    assert!(took < END, "{signal}: ended after {took:?}");
}
